"""Errors that a user reads: one sentence that says what is wrong, where, and what to do."""


class ThornbackError(Exception):
    """Base of every error that thornback raises on purpose.

    The message is one sentence for the person at the keyboard. The command line prints it without a
    traceback and exits with 2; everything else that escapes is a bug and keeps its traceback.
    """


class ConfigError(ThornbackError):
    """A recipe or an override is wrong."""


class DataError(ThornbackError):
    """A dataset is missing, unreadable, or has bad rows."""


class ModelError(ThornbackError):
    """A model directory cannot be used."""


class RewardError(ThornbackError):
    """A reward raised, or returned something that is not a number within its range."""


class EnvironmentFailed(ThornbackError):
    """Environments of too many rollouts raised, or did not answer in time."""


class InvalidRequest(ThornbackError, ValueError):
    """A generation request that cannot be served as it stands; the gateway answers 400."""


class ActorLost(ThornbackError):
    """An actor died or did not answer within its deadline; names the actor, its node and its work."""


class TransferFailed(ThornbackError):
    """Keys and values could not be fetched from where they were offered; they are computed again."""


class NotImproved(ThornbackError):
    """A run finished, and its model is no better than the one it started from."""
