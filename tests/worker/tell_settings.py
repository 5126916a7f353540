"""Loaded by a started worker (`-I tests.worker.tell_settings`): writes down how the worker is really set, once it is
ready, from the objects that act on it and from the sockets it has opened."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

from celery.signals import worker_ready

VARIABLE = "TELL_SETTINGS"


@worker_ready.connect
def tell(sender: Any, **_: Any) -> None:
    configuration, channel = sender.app.conf, sender.task_consumer.channel
    pool = sender.controller.pool
    polled = channel.client.connection_pool.get_connection()
    polled.connect()
    names = (
        "worker_cancel_long_running_tasks_on_connection_loss",
        "worker_soft_shutdown_timeout",
        "worker_enable_remote_control",
        "task_ignore_result",
        "task_acks_late",
        "task_reject_on_worker_lost",
        "broker_connection_max_retries",
        "broker_connection_retry_on_startup",
        "result_backend",
    )
    told = {name: configuration[name] for name in names} | {
        "accepted": sorted(sender.task_consumer.accept),
        "result_backend_class": type(sender.app.backend).__name__,
        "pool": type(pool).__module__,
        "concurrency": pool.limit,
        "start_method": configuration.worker_pool_start_method,
        "tasks_per_child": pool._pool._maxtasksperchild,
        "child_commands": [Path(f"/proc/{one.pid}/cmdline").read_text().split("\0") for one in pool._pool._pool],
        "messages_ahead": sender.qos.value,
        "visibility_timeout": channel.visibility_timeout,
        "queues": sorted(queue.name for queue in sender.task_consumer.queues),
        "queue_order": channel.queue_order_strategy,
        "key_prefix": channel.global_keyprefix,
        "health_check_interval": channel.health_check_interval,
        "socket_timeout": polled._sock.gettimeout(),
        "socket_connect_timeout": polled.socket_connect_timeout,
        "socket_keepalive": polled._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        "on_sigterm": getattr(signal.getsignal(signal.SIGTERM), "__name__", ""),
    }
    Path(os.environ[VARIABLE]).write_text(json.dumps(told))
