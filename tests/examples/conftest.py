from training_fixtures import *  # noqa: F403 (fixtures)
from training_fixtures import _fresh_accelerator, _one_thread  # noqa: F401
