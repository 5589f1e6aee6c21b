"""What a user is told when a kernel cannot be had: the libraries' own errors, which the server's answers lead to."""

import pytest

from tests.hub.conftest import REPO

pytestmark = pytest.mark.compat


def get(repo_id, version, trust_remote_code):
    from kernels import get_kernel

    get_kernel(repo_id, version=version, trust_remote_code=trust_remote_code)
    return "loaded"


def test_untrusted_organization_needs_trust_remote_code(user, hub, v1, monkeypatch):
    monkeypatch.setattr(hub, "trusted", set())
    asked = len(hub.requests)
    kind, message = user.error(get, REPO, 1, False)
    assert kind == "ValueError"
    assert f"'{REPO}' is not from a trusted publisher" in message
    assert "trust_remote_code=True" in message
    assert not any(REPO in request for request in hub.requests[asked:]), "nothing was downloaded"
    assert user.call(get, REPO, 1, True) == "loaded"


def test_missing_version_names_those_there_are(user, v1):
    assert user.error(get, REPO, 7, False) == ("ValueError", "Version 7 not found, available versions: 1")


def test_missing_repository_is_not_found(user, v1):
    kind, message = user.error(get, "org/nothing-here", 1, False)
    assert kind == "RepositoryNotFoundError"
    assert "404" in message and "org/nothing-here" in message
