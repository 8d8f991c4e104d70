"""What stages spent, carried by their artifacts, so that a ledger can be checked and made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from headwater.errors import InputError
from headwater.ledger import Ledger
from headwater.ledger.ledger import Kind
from headwater.ledger.statement import Statement, check_ledger, closing_statement, restore
from headwater.plain_json import read_json_file
from headwater.storage import write_whole
from headwater.workflow.graph import Graph, StageNode
from headwater.workflow.store import ArtifactStore

#: The closing statement in a published artifact.
ACCOUNT_FILE = "account.json"


def write_statement(ledger: Ledger, stage: str, kind: Kind, folder: Path) -> None:
    """Write what a stage's account came to into the folder that will be published."""
    statement = closing_statement(ledger, stage, kind)
    assert statement is not None, "a stage has its account from its start"
    write_whole(folder / ACCOUNT_FILE, json.dumps(statement.as_dict(), indent=1) + "\n")


def kind_of(node: StageNode) -> Kind:
    """The account a stage is charged to."""
    return "eval" if node.is_evaluation else "train"


def settle_accounts(
    ledger: Ledger,
    graph: Graph,
    store: ArtifactStore,
    published: Iterable[str],
    say: Callable[[str], None],
) -> None:
    """Check the ledger, and make accounts of published stages come to their closing statements.

    Artifacts of older versions have none and are left alone. say: told of what was missing.
    Raises InputError for a damaged ledger.
    """
    check_ledger(ledger)
    restored = []
    for fingerprint in published:
        stated = _read(store.path(fingerprint) / ACCOUNT_FILE)
        kind = kind_of(graph.nodes[fingerprint])
        if stated is not None and stated != closing_statement(ledger, fingerprint, kind):
            restore(ledger, fingerprint, kind, stated)
            restored.append(graph.describe(fingerprint))
    if restored:
        say(
            f"the ledger did not have what {len(restored)} finished stages spent (first: "
            f"{restored[0]}): taken from their artifacts"
        )


def _read(path: Path) -> Statement | None:
    if not path.is_file():
        return None
    try:
        return Statement.of(read_json_file(path))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); expected a closing statement: remove this artifact "
            "and run again"
        ) from error
