"""Which permissions are missing: asks the server for each right that a role needs, without changing anything.

A write right is probed with a message that the server must refuse (an expected sequence that no stream reaches); a
missing right answers at once as a permission violation, which the connection names.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from syncd.errors import NotPermitted, SyncdError

if TYPE_CHECKING:
    from syncd.store.connection import Connection

NEVER = str((1 << 63) - 1)


async def missing_permissions(connection: Connection, bucket: str, *, publish: bool) -> list[str]:
    """Return the subjects that this user may not publish to though its role needs them.

    :param publish: the role: publisher, else subscriber.
    """
    last = json.dumps({"last_by_subj": f"$O.{bucket}.M.c3luY2Q="}).encode()
    probes: list[tuple[str, bytes, dict[str, str] | None]] = [
        (f"{connection.api}.DIRECT.GET.OBJ_{bucket}", last, None),
    ]
    if publish:
        refused = {"Nats-Expected-Last-Subject-Sequence": NEVER}
        probes += [
            (f"{connection.api}.STREAM.INFO.OBJ_{bucket}", b"", None),
            (f"$O.{bucket}.C.syncd-probe", b"", refused),
            (f"$O.{bucket}.M.c3luY2Q=", b"", refused),
        ]
    missing = []
    for subject, payload, headers in probes:
        try:
            await connection.request(subject, payload, headers=headers)
        except NotPermitted:
            missing.append(subject)
        except SyncdError:
            continue  # silence or another refusal: not a question of permissions
    return missing
