"""A stand-in for gcloud. It plays queued resources, their machines and a training on them, and
writes down every call. It does not import the package: some tests put it first on PATH, others call
``main`` where a process would be started, which is a hundred times faster. A code of None is a
command that never returns, having printed what it says.

The world lies in the JSON file that STAND_IN names; the tests change ``now`` in it, and what is to
happen. With ``local`` in it, a command sent to the machines is really run, once for each, with a
folder of its own as HOME; else ``host.sh`` is played too.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time

WORLD = {
    "now": 0.0,
    "seed": 0,
    "hosts": 2,  # of each slice
    "queue": [300.0],  # seconds until machines are there, of each request in turn
    "lives": [],  # seconds until each set of slices is preempted, in turn; then never
    "work": 0.0,  # seconds that the training needs
    "saved": 0.0,  # of it, in checkpoints
    "checkpoint_every": 1800.0,
    "exits": [],  # [work done, exit code, on the first host alone], in order
    "reboots": [],  # work done when a machine starts anew
    "create_errors": [],  # texts, one an attempt; "" is none
    "describe_errors": 0.0,  # probability
    "ssh_errors": 0.0,  # probability that a machine does not answer
    "delete_errors": 0,  # how many deletes fail
    "silent_after": None,  # seconds after which the first machines answer no more
    "hangs_after": None,  # seconds after which ssh to the first machines never returns
    "down": None,  # [from, to]: describe fails
    "local": "",
    "resources": {},
    "billed": 0.0,  # seconds that machines existed
    "preemptions": 0,
    "starts": 0,
    "asked": 0,
}


def main(argv):
    path = os.environ["STAND_IN"]
    with open(path) as file:
        world = json.load(file)
    with open(path + ".calls", "a") as file:
        file.write(json.dumps(argv) + "\n")
    assert argv[:2] == ["compute", "tpus"] and "--quiet" in argv and "--zone=z" in argv, argv
    rng = random.Random(f"{world['seed']} {os.path.getsize(path + '.calls')}")
    advance(world)
    code, out, err = answer(world, argv[2:], rng)
    with open(path + ".new", "w") as file:
        json.dump(world, file)
    os.replace(path + ".new", path)
    return code, out, err


def flag(argv, name):
    for item in argv:
        if item.startswith(f"--{name}="):
            return item.split("=", 1)[1]
    return None


def advance(world):
    """Brings every resource and training from the last call to now."""
    for one in world["resources"].values():
        if one["state"] == "WAITING_FOR_RESOURCES" and world["now"] >= one["active_at"]:
            one["state"], one["seen"] = "ACTIVE", one["active_at"]
        if one["state"] != "ACTIVE":
            continue
        end = min(world["now"], one["dies_at"] if one["dies_at"] is not None else float("inf"))
        world["billed"] += end - one["seen"]
        train(world, one, end)
        one["seen"] = end
        if one["dies_at"] is not None and world["now"] >= one["dies_at"]:
            one["state"], one["job"] = "SUSPENDED", None
            world["preemptions"] += 1


def train(world, one, end):
    job = one["job"]
    if not job or job["state"] != "running":
        return
    done = job["from"] + end - job["at"]
    world["saved"] = max(
        world["saved"], done // world["checkpoint_every"] * world["checkpoint_every"]
    )
    if world["reboots"] and done >= world["reboots"][0]:
        world["reboots"].pop(0)
        job["state"] = "lost"
    elif world["exits"] and done >= world["exits"][0][0]:
        job["state"], (_, job["code"], job["alone"]) = "exited", world["exits"].pop(0)
        if job["code"] == 75:
            world["saved"] = done
    elif done >= world["work"]:
        job["state"], job["code"], world["saved"] = "exited", 0, world["work"]


def answer(world, argv, rng):
    group, verb, name = argv[:3]
    if verb == "scp":
        name = argv[3].removesuffix(":")
    one = world["resources"].get(name)
    missing = 1, "", f"ERROR: (gcloud) NOT_FOUND: Resource '{name}' was not found\n"
    if group == "tpu-vm":
        assert verb == "describe"
        return 0, json.dumps({"networkEndpoints": [{}] * world["hosts"]}), ""
    if verb == "create":
        world["asked"] += 1
        error = world["create_errors"].pop(0) if world["create_errors"] else ""
        if error:
            return 1, "", f"ERROR: (gcloud) {error}\n"
        assert one is None, "created twice"
        assert "--async" in argv and flag(argv, "runtime-version"), argv
        world["resources"][name] = create(world, argv, name)
        return 0, "", ""
    if verb == "describe":
        down = world["down"] and world["down"][0] <= world["now"] < world["down"][1]
        if down or rng.random() < world["describe_errors"]:
            return 1, "", "ERROR: (gcloud) HTTPError 503: The service is unavailable\n"
        return missing if one is None else (0, json.dumps(described(one, name)), "")
    if one is None:
        return missing
    if verb == "delete":
        assert "--force" in argv
        if world["delete_errors"]:
            world["delete_errors"] -= 1
            return 1, "", "ERROR: (gcloud) HTTPError 409: the resource is busy\n"
        del world["resources"][name]
        return 0, "", ""
    if one["state"] != "ACTIVE":
        return 1, "", "ERROR: (gcloud) the TPU is not READY\n"
    assert "--node=all" in argv and "--worker=all" in argv, argv
    if verb == "scp":
        return copy(world, one, argv[2])
    assert verb == "ssh", argv
    return ssh(world, one, flag(argv, "command"), rng)


def create(world, argv, name):
    count = int(flag(argv, "node-count") or 1)
    wait = world["queue"].pop(0) if len(world["queue"]) > 1 else world["queue"][0]
    active = world["now"] + wait
    life = world["lives"].pop(0) if world["lives"] else None
    return {
        "state": "WAITING_FOR_RESOURCES",
        "accelerator": flag(argv, "accelerator-type"),
        "nodes": [flag(argv, "node-id")]
        if count == 1
        else [f"{flag(argv, 'node-prefix')}-{i}" for i in range(count)],
        "created": str(world["now"]),
        "active_at": active,
        "dies_at": None if life is None else active + life,
        "job": None,
    }


def described(one, name):
    node = {"node": {"acceleratorType": one["accelerator"]}}
    if len(one["nodes"]) == 1:
        node["nodeId"] = one["nodes"][0]
    else:
        node["multisliceParams"] = {"nodeCount": len(one["nodes"]), "nodeIdPrefix": name}
    return {
        "name": f"projects/p/locations/z/queuedResources/{name}",
        "createTime": one["created"],
        "state": {"state": one["state"]},
        "tpu": {"nodeSpec": [node]},
    }


def machines(world, one):
    return [f"{node}-w-{i}" for node in one["nodes"] for i in range(world["hosts"])]


def copy(world, one, file):
    if world["local"]:
        for machine in machines(world, one):
            home = os.path.join(world["local"], machine)
            os.makedirs(home, exist_ok=True)
            subprocess.run(["cp", file, home], check=True)
    return 0, "", ""


def ssh(world, one, command, rng):
    out, code = "", 0
    silent = world["silent_after"]
    for i, machine in enumerate(machines(world, one)):
        if rng.random() < world["ssh_errors"] or (
            silent is not None and world["asked"] == 1 and world["now"] > one["active_at"] + silent
        ):
            code = 255
            continue
        if world["local"]:
            env = dict(os.environ, HOME=os.path.join(world["local"], machine), WEBSSL_HOST=machine)
            done = subprocess.run(
                ["bash", "-c", command], env=env, cwd=env["HOME"], capture_output=True, text=True
            )
            out += done.stdout
            code = code or done.returncode
            print(done.stderr, file=sys.stderr)
        else:
            out += played(world, one, machine, i, command)
    hangs = world["hangs_after"]
    if (
        hangs is not None and world["asked"] == 1 and world["now"] > one["active_at"] + hangs
    ):  # the second machine's
        first = machines(world, one)[0]
        return None, "".join(line for line in out.splitlines(True) if first in line), ""
    return code, out, "" if code == 0 else "some machine did not answer\n"


def played(world, one, machine, i, command):
    """What host.sh does, for the training as a whole."""
    job = one["job"]
    words = command.split("host.sh ")[-1].split(" ")
    if words[0] == "install":
        return f"WEBSSL {machine} installed - -\n"
    if words[0] == "mount":
        return f"WEBSSL {machine} mounted - -\n"
    if words[0] == "logs":
        return f"{machine}: the last line of {machine}\n"
    if words[0] == "start" and not (
        job and (job["state"] == "running" or job["token"] == words[1])
    ):
        text = re.search(r"start \S+ '(.*)'$", command, re.DOTALL)[1]
        digest = hashlib.md5(text.encode()).hexdigest()[:12]
        world["starts"] += 1
        job = one["job"] = {
            "state": "running",
            "token": words[1],
            "digest": digest,
            "from": world["saved"],
            "at": world["now"],
            "code": None,
            "alone": False,
        }
    if words[0] == "stop" and job and job["state"] in ("running", "exited"):
        if words[1] == "TERM" and job["state"] == "running":
            job["state"], job["code"] = "exited", 75
            world["saved"] = job["from"] + world["now"] - job["at"]
        elif words[1] == "KILL":
            job["alone"] = False
    if not job:
        return f"WEBSSL {machine} absent - -\n"
    if job["state"] == "exited" and job["alone"] and i:  # the others wait for the first
        return f"WEBSSL {machine} running - {job['digest']}\n"
    code = job["code"] if job["state"] == "exited" else "-"
    return f"WEBSSL {machine} {job['state']} {code} {job['digest']}\n"


if __name__ == "__main__":
    status, printed, complained = main(sys.argv[1:])
    sys.stdout.write(printed)
    sys.stderr.write(complained)
    if status is None:
        sys.stdout.flush()
        time.sleep(60)
    sys.exit(status)
