"""A stand-in for what a run has and a model under test does not."""


class Off:
    """Stands for Megatron's timers, and for whatever else a run has and a model does not."""

    def __call__(self, *args, **kwargs):
        return self

    def start(self):
        pass

    stop = start

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass
