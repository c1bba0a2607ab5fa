"""What makes a loaded codec fast and small, from outside; `oscar.inference.load` is the everyday entrance."""

import oscar.models  # noqa: F401, first: see there
