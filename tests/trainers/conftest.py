"""One thread: tiny matrices gain nothing from more, and lose much where other work shares the cores."""

import torch

torch.set_num_threads(1)
