"""Replicas under Ray Serve; runs in Ray's environment and takes orders, one JSON object a line, from stdin.

``python ray_server.py PORT ARGUMENTS``; an order is ``{"replicas": N, "max_waiting": M}``, and answered with ``ready``.
"""

import json
import sys

import ray
from ray import serve

from engines.http.ray_app import Replica, application


def deploy(args, replicas, **changed):
    """Let so many replicas run; changed arguments replace all of them, one after another."""
    made = Replica.options(
        num_replicas=replicas,
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=20,
        ray_actor_options={"num_cpus": 0.1},
    )
    serve.run(made.bind(**{**args, **changed}), name="iapt", route_prefix="/")
    print("ready", flush=True)


if __name__ == "__main__":
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    settings = json.loads(sys.argv[2])
    serve.run(application(settings), name="iapt", route_prefix="/")
    deploy(settings, 2)
    for line in sys.stdin:
        deploy(settings, **json.loads(line))
    serve.shutdown()
    ray.shutdown()
