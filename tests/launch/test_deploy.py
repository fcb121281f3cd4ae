"""The image and the manifest for Kubernetes agree with the package, and the manifest with JobSet's
schema."""

import math
import re

import pytest
import yaml

from tests.e2e.runner import ROOT
from webssl_jax import cli, environment
from webssl_jax import config as configs

ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob"}
TEXTS = {str: str}  # any keys
# Of jobset.x-k8s.io/v1alpha2 (the CRD of kubernetes-sigs/jobset, August 2026) the fields in use: a
# type, a set of words, a list of one kind, or an object. Nothing else may be in the manifest.
_CONTAINER = {"name": str, "image": str, "args": [str]}
_CONTAINER |= {"resources": {"requests": {str: int}, "limits": {str: int}}}
_CONTAINER |= {"volumeMounts": [{"name": str, "mountPath": str}]}
_CSI = {"driver": str, "volumeAttributes": TEXTS}
_POD = {
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": TEXTS,
    "containers": [_CONTAINER],
    "volumes": [{"name": str, "csi": _CSI}],
}
_ON_CODES = {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]}
_POD_RULE = {
    "action": {"FailJob", "FailIndex", "Ignore", "Count"},
    "onExitCodes": _ON_CODES,
    "onPodConditions": [{"type": str, "status": str}],
}
_JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": {"Indexed", "NonIndexed"},
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [_POD_RULE]},
    "template": {"metadata": {"annotations": TEXTS}, "spec": _POD},
}
_RULE = {
    "name": str,
    "action": ACTIONS,
    "onJobFailureReasons": [str],
    "onJobFailureMessagePatterns": [str],
}
SCHEMA = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "annotations": TEXTS},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [_RULE]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": _JOB}}],
    },
}


def check(value, schema, where="manifest"):
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for key, inner in value.items():
            assert key in schema or str in schema, f"{where}.{key}: no such field"
            check(inner, schema.get(key, schema.get(str)), f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for inner in value:
            check(inner, schema[0], where)
    elif isinstance(schema, set):
        assert value in schema, f"{where}: {value}"
    else:
        assert type(value) is schema, f"{where}: {value!r} is not {schema.__name__}"


@pytest.fixture(scope="module")
def manifest():
    return yaml.safe_load((ROOT / "tools" / "jobset.yaml").read_text("utf-8"))


@pytest.fixture
def job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_the_manifest_has_fields_words_and_types_of_jobset_alone(manifest):
    check(manifest, SCHEMA)


def test_every_machine_of_the_slice_gets_its_process_and_its_chips(job):
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == job["parallelism"] * chips
    assert job["completions"] == job["parallelism"] and job["backoffLimit"] == 0
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}


def test_the_command_of_the_manifest_is_one_that_train_takes(job):
    (container,) = job["template"]["spec"]["containers"]
    command, _, config, _, workdir, *overrides = container["args"]
    assert command == "train" and container["args"][1::2][:2] == ["--config", "--workdir"]
    loaded = configs.load(config, [text.removeprefix("--config.") for text in overrides])
    (mount,) = (mount["mountPath"] for mount in container["volumeMounts"])
    for path in (workdir, loaded.data.train, loaded.host.compilation_cache):
        assert path.startswith(f"{mount}/")


def test_bad_input_ends_the_job_and_a_saved_run_is_started_again_for_free(manifest, job):
    """What Kubernetes says of a pod that a rule of the job matched."""
    said = "Container train for pod default/p failed with exit code {} matching FailJob rule"
    (container,) = job["template"]["spec"]["containers"]

    def outcome(code):
        rules = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"][:2]]
        assert all(rule["containerName"] == container["name"] for rule in rules)
        known = any(code in rule["values"] for rule in rules)
        reason = "PodFailurePolicy" if known else "BackoffLimitExceeded"
        for rule in manifest["spec"]["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            said_so = any(re.search(pattern, said.format(code)) for pattern in patterns)
            if reason in rule["onJobFailureReasons"] and said_so:
                return rule["action"]
        return "RestartJobSet"

    assert outcome(cli.EXIT_BAD_INPUT) == "FailJobSet"
    assert outcome(cli.EXIT_RESTART) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(cli.EXIT_FAILURE) == outcome(137) == "RestartJobSet"
    taken = job["podFailurePolicy"]["rules"][2]
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_the_image_copies_what_is_there_and_starts_a_command_of_the_package():
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    said = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    copied = [name for word, rest in said if word == "COPY" for name in rest.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored[0] == "*" and {f"!{name}" for name in copied} <= set(ignored)
    assert all((ROOT / name).exists() for name in copied)
    assert {"setup.py", "pyproject.toml", "webssl_jax", "configs", "tools"} <= set(copied)
    setup = (ROOT / "setup.py").read_text("utf-8")
    extras = re.search(r"ARG EXTRAS=(\S+)", "\n".join(lines))[1].split(",")
    assert all(f'"{extra}": ' in setup for extra in extras)
    (python,) = (rest for word, rest in said if word == "FROM")
    least = re.search(r'python_requires=">=(\d+\.\d+)"', setup)[1]
    assert python == f"python:{least}-slim"
    (entry,) = (rest for word, rest in said if word == "ENTRYPOINT")
    assert f"{yaml.safe_load(entry)[0]}=webssl_jax" in setup


def test_a_run_in_an_image_knows_its_revision(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "webssl_jax" / "environment.py"))
    assert environment.git_revision() == "unknown"
    monkeypatch.setenv("WEBSSL_REVISION", "abc123")
    assert environment.git_revision() == "abc123"
