"""An engine of a server that steps when a test lets it."""

import threading


class Steps:
    """Steps of an engine that happen when they are allowed.

    `ended` are the requests that somebody has ended: the next step leaves them out.

    A page shows that before the server knows: steps that are allowed in between leave nothing out.
    """

    def __init__(self, engine):
        self.engine = engine
        self.allowed = threading.Semaphore(0)
        self.ended = set()
        step, end = engine.step, engine.end

        def when_allowed():
            self.allowed.acquire()
            step()

        def end_noted(request, event):
            self.ended.add(request)
            end(request, event)

        engine.step, engine.end = when_allowed, end_noted

    def allow(self, num):
        self.allowed.release(num)

    def free(self):
        for name in ("step", "end"):
            self.engine.__dict__.pop(name, None)
        self.allow(1)
