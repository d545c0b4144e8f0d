"""The policy file: read whole or refused whole, with the line and the nearest right name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gmemd.authority.peer import Peer
from gmemd.authority.policy import Policy
from gmemd.authority.reading import read_policy
from gmemd.authority.rights import Rights, Role
from gmemd.errors import QmpError
from gmemd.schema.validate import Schema

SCHEMA = Schema.load()
TEXT = """\
version = 1
default = { role = "none" }

[[rule]]
name  = "virtqemud"
match = { uid = "daemon", unit = ["virtqemud.service"] }
role  = "tenant"
allow = ["memdev-claim"]
deny  = [
  "memdev-adopt",
  "memdev-snapshot*",
]
types = ["memory-backend-memfd"]
paths = ["/var/lib/gmemd/../gmemd/x"]
share = "rule"
[rule.limits]
bytes = "64GiB"
objects = 64
hugepages-2M = "1.5G"
"""


def policy_of(path: Path, text: str) -> Policy:
    path.write_text(text)
    path.chmod(0o600)
    return read_policy(str(path), SCHEMA)


def refusal(path: Path, text: str) -> str:
    with pytest.raises(QmpError) as caught:
        policy_of(path, text)
    assert caught.value.desc.startswith(f"{path}:")
    return caught.value.desc.removeprefix(f"{path}:")


def rights(policy: Policy, **peer: object) -> Rights:
    return policy.rights_of(Peer(**{"pid": 1, "uid": 1, "gid": 1, "ruid": 1, **peer}))  # type: ignore[arg-type]


def test_a_rule_is_what_it_says(tmp_path: Path) -> None:
    found = rights(policy_of(tmp_path / "p", TEXT), unit="virtqemud.service")
    assert (found.role, found.rule, found.types, found.paths, found.room, found.account) == (
        Role.TENANT, "virtqemud", {"memory-backend-memfd"}, ("/var/lib/gmemd/x",), "1", "rule:virtqemud")
    assert found.limits == {"bytes": 64 << 30, "objects": 64, "hugepages-2M": 3 << 29}
    assert found.may("memdev-claim")
    assert found.may("memdev-get-snapshot")
    assert not any(map(found.may, ("memdev-adopt", "memdev-snapshot", "memdev-snapshot-delete", "quit")))


@pytest.mark.parametrize(("right", "wrong", "said"), [
    ('role  = "t', 'rle = "t', "7: rule 'virtqemud': unknown key 'rle' (did you mean 'role'?)"),
    ('"tenant"', '"tennant"', "7: rule 'virtqemud': 'tennant' is not one of none, observer, member, tenant, operator,"
                              " admin (did you mean 'tenant'?)"),
    ('"memdev-adopt"', '"memdev-adpt"', "9: rule 'virtqemud': unknown command 'memdev-adpt' (did you mean"
                                        " 'memdev-adopt'?)"),
    ('"memory-backend-memfd"', '"memory-backend-memfds"', "13: rule 'virtqemud': unknown object type"
     " 'memory-backend-memfds' (did you mean 'memory-backend-memfd'?)"),
    ('"daemon"', '"daemn"', "6: rule 'virtqemud': unknown user 'daemn' (did you mean 'daemon'?)"),
    ('"64GiB"', '"64 gigs"', "17: rule 'virtqemud': '64 gigs' is not a value of 'bytes', which is a number of"
     " bytes, or a size such as '64GiB'"),
    ('"64GiB"', '"1.2.3"', "17: rule 'virtqemud': '1.2.3' is not a size such as '64GiB'"),
    ("objects = 64", "objects = -1", "18: rule 'virtqemud': -1 is not a value of 'objects', which is a number"),
    ("objects = 64", "objcts = 64", "18: rule 'virtqemud': unknown key 'objcts' (did you mean 'objects'?)"),
    ("hugepages-2M", "hugepages-2X", "19: rule 'virtqemud': unknown key 'hugepages-2X'"),
    ('name  = "virtqemud"\n', "", "4: rule 1: 'name' is missing"),
    ('name  = "virtqemud"', 'name = "Two words"', "5: rule 'Two words': 'Two words' is not a value of 'name', which"
     " is up to 64 of a-z, 0-9, _, . and -"),
    ('["/var', '["var', "14: rule 'virtqemud': 'var/lib/gmemd/../gmemd/x' is not a value of 'paths', which is"
     " a path that begins with /"),
    ('{ uid = "daemon", unit = ["virtqemud.service"] }', "{}", "6: rule 'virtqemud': 'match' is empty"),
    ('{ uid = "daemon", unit = ["virtqemud.service"] }', "{ http = true }",
     "6: rule 'virtqemud': 'http' stands alone, and its role is observer or none"),
    ("version = 1", "version = 2", "1: 2 is not a value of 'version', which is 1"),
    ("version = 1", "", "1: 'version' is missing"),
    ('default = { role = "none" }', 'default = { role = "none"', "2: Unclosed inline table"),
    ('"rule"', '"rule"\nshare = "uid"', "16: Cannot overwrite a value"),
])
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    """The right one is read afterwards."""
    assert TEXT.count(right) >= 1
    assert refusal(tmp_path / "p", TEXT.replace(right, wrong, 1)) == said
    policy_of(tmp_path / "p", TEXT)


def test_what_is_not_known_of_a_client_matches_nothing(tmp_path: Path) -> None:
    """Not even a pattern for everything: a process of another container has neither unit nor control group here."""
    for key, pattern, known in (("unit", "*", "a.service"), ("cgroup", "/", "/a"), ("selinux", "*", "a_t")):
        policy = policy_of(tmp_path / "p", f'version = 1\n[[rule]]\nname = "r"\nmatch = {{ {key} = "{pattern}" }}\n'
                                           'role = "operator"\n')
        assert rights(policy, **{"label" if key == "selinux" else key: known}).role is Role.OPERATOR
        with pytest.raises(QmpError, match="does not let it in"):
            rights(policy)


def test_more_that_is_refused(tmp_path: Path) -> None:
    rule = TEXT[TEXT.index("[[rule]]"):]
    assert refusal(tmp_path / "p", TEXT + rule) == "21: rule 'virtqemud': a rule is named 'virtqemud' already"
    observer = ('version = 1\n[[rule]]\nname = "o"\nmatch = {uid = 1}\nrole = "observer"\n'
                'allow = ["query-jobs", "quit"]\n')
    assert refusal(tmp_path / "p", observer) == "6: rule 'o': an observer only reads, and 'quit' changes something"


@pytest.mark.parametrize(("mode", "said"), [(0o620, "its mode is 0620"), (0o602, "its mode is 0602")])
def test_nobody_else_may_write_it(tmp_path: Path, mode: int, said: str) -> None:
    policy_of(tmp_path / "p", TEXT)
    (tmp_path / "p").chmod(mode)
    with pytest.raises(QmpError, match=f"may be written by others: {said}"):
        read_policy(str(tmp_path / "p"), SCHEMA)


@pytest.mark.skipif(os.geteuid() != 0, reason="root can give files away")
def test_it_is_roots_or_ours(tmp_path: Path) -> None:
    policy_of(tmp_path / "p", TEXT)
    os.chown(tmp_path / "p", 1, 1)
    with pytest.raises(QmpError, match="is owned by uid 1, not by root or gmemd's own user"):
        read_policy(str(tmp_path / "p"), SCHEMA)


def test_what_is_not_a_policy_is_refused(tmp_path: Path) -> None:
    for make, said in ((lambda path: path.mkdir(), "Is a directory"), (lambda path: None, "No such file"),
                       (lambda path: path.write_bytes(b"\xff"), "is not UTF-8"),
                       (lambda path: path.write_bytes(b"#" * ((1 << 20) + 1)), "at most 1 MiB")):
        path = tmp_path / said.replace(" ", "-")
        make(path)
        with pytest.raises(QmpError, match=said):
            read_policy(str(path), SCHEMA)


MATCH = """\
version = 1
default = { role = "observer" }
[[rule]]
name = "root"
match = { uid = 0 }
role = "admin"
[[rule]]
name = "first"
match = { cgroup = "/machine.slice", group = [7, 8] }
role = "operator"
[[rule]]
name = "second"
match = { unit = "qemu@*.service" }
role = "tenant"
[[rule]]
name = "labelled"
match = { selinux = "system_u:*:svirt_t:*" }
role = "none"
[[rule]]
name = "web"
match = { http = true }
role = "observer"
"""


def test_the_first_rule_that_matches_wins(tmp_path: Path) -> None:
    policy = policy_of(tmp_path / "p", MATCH)
    assert rights(policy).rule == ""
    assert rights(policy).role is Role.OBSERVER
    assert rights(policy, groups=frozenset((1, 8)), cgroup="/machine.slice/a.scope").rule == "first"
    assert rights(policy, groups=frozenset((1, 8)), cgroup="/machine.slices", unit="qemu@a.service").rule == "second"
    assert rights(policy, groups=frozenset((1, 9)), cgroup="/machine.slice").rule == ""
    assert policy.rights_of(None).rule == "web"
    with pytest.raises(QmpError, match="does not let it in \\(rule 'labelled'\\)"):
        rights(policy, label="system_u:system_r:svirt_t:s0:c1")


@pytest.mark.parametrize("ruid", [1000, None])
def test_an_admin_is_root_by_its_real_uid_too(tmp_path: Path, ruid: int | None) -> None:
    """A program that runs set-uid for somebody falls through to the next rule."""
    policy = policy_of(tmp_path / "p", MATCH)
    assert rights(policy, uid=0, ruid=0).role is Role.ADMIN
    assert rights(policy, uid=0, ruid=ruid).role is Role.OBSERVER


def test_without_a_rule_for_http_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(QmpError, match="does not let it in"):
        policy_of(tmp_path / "p", MATCH[:MATCH.index('[[rule]]\nname = "web"')]).rights_of(None)
