"""What drafts by prompt lookup are worth: tokens a second with and without, and that answers are the same.

    python -m benchmarks.drafts BUNDLE

The bundle is one of ``build --drafts``. Both sessions are open in one process and take turns, round by round, because
a machine's speed changes; a ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engines.serving.session import Request, Sampling, Session

SCHEMA = (
    "CREATE TABLE customers (customer_id INTEGER, first_name TEXT, last_name TEXT, city TEXT);\n"
    "CREATE TABLE orders (order_id INTEGER, customer_id INTEGER, order_date TEXT, total_amount REAL);\n"
)
NEWS = (
    "The harbour of Port Ellery was closed on Monday after a cargo ship ran aground near the northern breakwater. The "
    "port authority said that nobody was hurt and that two tugs would try to free the vessel at high tide. Ferries "
    "to the islands were sent to the southern terminal, where passengers waited up to three hours. "
)
RECORD = '{"name": "Ada Lindqvist", "street": "14 Harbour Road", "city": "Port Ellery", "phone": "555-0134", "plan": 3}'
COPYING = {
    "repeat": f"Repeat this text word for word:\n{NEWS}",
    "json": f"Write this record again with the phone number 555-0199, everything else as it is:\n{RECORD}",
    "sql": f"{SCHEMA}\nRepeat the two CREATE TABLE statements, then write a query for the total amount by city.",
    "extract": f"Copy every sentence of the text that names a place.\n\n{NEWS}",
    "correct": "Correct the spelling and write the whole text again: "
    "The old libary on the hill was bilt in 1902 and has more then forty thousand books, most of them on ships.",
    "summary": f"Summarise in two sentences, with the words of the text:\n{NEWS}",
    "quote": f"Quote the text, then say in one sentence who is responsible for the harbour.\n\n{NEWS}",
    "table": "Write these lines as they are, sorted by price: apples 3.20, pears 2.80, cherries 7.50, plums 4.10, "
    "grapes 5.60, oranges 2.10, lemons 1.90, peaches 6.30",
}
"""Tasks whose answers take much from the instruction."""
OTHER = [
    "Write a short story about a lighthouse keeper.",
    "Explain why the sky is blue.",
    "Give advice to somebody who moves to a large city.",
    "What is the difference between a violin and a cello?",
    "Describe how bread is made.",
    "Write a poem about winter.",
    "Why do people travel?",
    "Tell me about the history of tea.",
]

AGAIN = 3
"""Times that a session is asked whether an answer is always the same."""


def requests(tasks: str, rows: int, first: int, new_tokens: int) -> list[Request]:
    """One for each row; the tasks in turn, beginning with another one in each round."""
    texts = list(COPYING.values()) if tasks == "copying" else OTHER
    # other texts are sampled, because a small model's greedy ones soon repeat themselves, and drafts like that
    sampling = [Sampling(temperature=0.0 if tasks == "copying" else 1.0, seed=first + row) for row in range(rows)]
    return [
        Request("", texts[(first + row) % len(texts)], max_new_tokens=new_tokens, sampling=sampling[row])
        for row in range(rows)
    ]


def measured(session: Session, asked: Sequence[Request]) -> tuple[list[list[int]], float]:
    """The answers, and tokens a second from when every row has its first token."""
    answers: list[list[int]] = [[] for _ in asked]
    times = []
    begun = 0.0
    for token in session.stream(asked):
        answers[token.index].append(token.token)
        if not begun and all(answers):
            begun = time.perf_counter()
        elif begun:
            times.append(time.perf_counter())
    return answers, len(times) / (times[-1] - begun) if times else 0.0


def compare_drafts(
    bundle: Path, drafts: int, threads: int | None, rounds: int, rows: Sequence[int] = (1, 8), new_tokens: int = 96
) -> Iterator[dict[str, Any]]:
    """Both sessions in turns; a record for each number of rows and kind of tasks.

    Where answers differ, the session without drafts is asked again: weights in 4 bits have a kernel of their own for a
    row that is alone, and when rows join and end is a matter of time, so that its own answers may differ, too.

    Raises:
        SystemExit: an answer differs that is always the same without drafts.
    """
    opened: dict[str, Any] = {"verify": False, "allow_unproven": True, "threads": threads}
    with Session.open(bundle, **opened) as plain, Session.open(bundle, drafts=drafts, **opened) as drafting:
        sessions = {"without": plain, "with": drafting}
        for count, tasks in itertools.product(rows, ("copying", "other")):
            speeds, unsteady, before = [], 0, drafting.state()
            for number in range(rounds):
                wanted = requests(tasks, count, number, new_tokens)
                order = list(sessions)[:: (1, -1)[number % 2]]
                found = {name: measured(sessions[name], wanted) for name in order}
                if found["with"][0] != found["without"][0]:
                    if all(measured(plain, wanted)[0] == found["without"][0] for _ in range(AGAIN)):
                        raise SystemExit(f"answers differ in round {number} of {tasks}, {count} rows")
                    unsteady += 1
                speeds.append({name: round(found[name][1], 2) for name in sessions})
            after = drafting.state()
            yield {
                "rows": count,
                "tasks": tasks,
                "rounds": speeds,
                "unsteady": unsteady,
                "drafted": after.drafted_tokens - before.drafted_tokens,
                "accepted": after.accepted_tokens - before.accepted_tokens,
            }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of iapt-export build --drafts")
    parser.add_argument("--drafts", type=int, default=3, help="tokens of a draft")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    for record in compare_drafts(asked.bundle, asked.drafts, asked.threads, asked.rounds, asked.rows, asked.new_tokens):
        gains = [each["with"] / each["without"] for each in record["rounds"]]
        middle = [statistics.median(each[name] for each in record["rounds"]) for name in ("without", "with")]
        print(
            f"{record['rows']} rows, {record['tasks']}: {middle[0]:.0f} to {middle[1]:.0f} tokens/s, times "
            f"{statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f}); "
            f"{record['accepted']} of {record['drafted']} drafted tokens were right",
            flush=True,
        )


if __name__ == "__main__":
    main()
