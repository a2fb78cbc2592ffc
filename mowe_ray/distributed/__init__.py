"""Everything that imports Ray or DeepSpeed: runs the packages below on a cluster."""

import os
import sys

# Ray reads these while it is imported; a user's own setting wins.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a worker may report once per interval: 2 s by default
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",  # unlimited by default: a lost report would hang the run
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line of a worker twice
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # 5 by default; a busy machine's proxies would be killed for ever
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean in the user's shell
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing phones home
}
if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
    # A local Ray writes a token on its first start and then asks for it; a Ray that is imported already would start
    # its servers with this setting but go on without it itself.
    _ENVIRONMENT["RAY_AUTH_MODE"] = "token"
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
