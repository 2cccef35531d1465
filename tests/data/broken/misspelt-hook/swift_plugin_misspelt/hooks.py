from swift_core import hookimpl


@hookimpl
def swift_aply_tuner(tuner_id, bundle, config):
    if tuner_id == "misspelt":
        return object()
    return None
