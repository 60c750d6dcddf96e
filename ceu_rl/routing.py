"""The old name of `ceu_rl.route`, kept for one release."""

from .route import *  # noqa: F403
from .route import route_descent  # noqa: F401
