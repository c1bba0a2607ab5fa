"""Training. `oscar.models` comes first: see there."""

import oscar.models  # noqa: F401
