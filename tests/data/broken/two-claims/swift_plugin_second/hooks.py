from swift_core import hookimpl


@hookimpl
def swift_apply_tuner(tuner_id, bundle, config):
    if tuner_id == "wanted":
        return object()
    return None
