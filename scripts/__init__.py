"""The programs. Families that installed packages bring along are known to them."""

from ordnung.modeling.registration import import_plugins

import_plugins()
