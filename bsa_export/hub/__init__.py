"""Publishing a converted folder on the Hugging Face Hub, and getting one.

`push` (= `upload(plan(...))`), `pull`, and `fetch` for whatever is loaded by name. Nothing here needs torch. The
token is the one that huggingface_hub finds, in the environment or in the stored login. It is never shown.
"""

from bsa_export.hub.download import Fetched, PullResult, fetch, pull
from bsa_export.hub.names import is_branch, parse_repo
from bsa_export.hub.publish import Plan, PushResult, plan, push, upload
from bsa_export.hub.pushed_files import PlannedFile

__all__ = [
    "Fetched",
    "Plan",
    "PlannedFile",
    "PullResult",
    "PushResult",
    "fetch",
    "is_branch",
    "parse_repo",
    "plan",
    "pull",
    "push",
    "upload",
]
