"""Watching the ranks of a job: rendezvous, heartbeats, and one report when a rank fails or is missing.

Read ``watcher`` first: it owns ``store_thread``, which sends all requests to the ``store`` (``heartbeat``,
``rendezvous``) and, after a failure, makes the ``report``. ``stack_location`` says what a rank is doing, and
``failure`` why it wants all ranks to end.
"""
