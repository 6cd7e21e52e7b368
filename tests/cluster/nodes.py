"""Two nodes on one machine: namespaces of network, host name and mounts, joined by a link. Needs root.

    with Nodes() as nodes:
        run(*nodes[1].command("hostname"))  # node1

A node knows the others by name in its own /etc/hosts, and has a /dev/shm of its own, for nodes share no memory; its one
network interface is eth0. Namespaces have no names, so that any number of pairs exist side by side, and nothing of them
outlasts their processes, which end with the context, or with this process, however that ends.

`python tests/cluster/nodes.py --delay-milliseconds 1 -m benchmarks.step` runs Python as two ranks of mpirun, one on
each.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import ROOT
from support.mpirun import MPIRUN, environment, run

PREFIX = "10.77.0."
LAUNCH = ROOT / "launch"
# For the scripts in launch/. Nodes share the machine's cores: bound to some, each would take the same.
OURS = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "BIND": "0"}
TOOLS = ("ip", "mount", "nsenter", "readlink", "unshare")
# Becomes node $1 until its input ends, which it does at the latest with the process that started it. Then it ends what
# runs in the node: all processes in its network namespace, which nothing else has. Those of a killed shell go too.
HOLD = """
echo "$1" >/proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && mount -t tmpfs shm /dev/shm &&
  ip link set lo up && echo up && cat
own=$(readlink /proc/self/ns/net)
for attempt in 1 2 3; do
  for process in /proc/[0-9]*; do
    if [ "$process" != "/proc/$$" ] && [ "$(readlink "$process/ns/net")" = "$own" ]; then
      kill -9 "${process#/proc/}"
    fi
  done
done 2>/dev/null
"""
# In ssh's place: options, a host, and a command for its shell.
SSH = """#!/bin/sh
while :; do
  case $1 in
    -[oplibF]) shift 2 ;;
    -*) shift ;;
    *) break ;;
  esac
done
case $1 in
  {cases}
  *) echo "no node is called $1" >&2; exit 255 ;;
esac
shift
exec nsenter --target "$holder" --net --uts --mount --wd="$PWD" sh -c "$*"
"""


def absence() -> str:
    """Says why there can be no nodes here, or returns ""."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"there is no {', '.join(missing)}"
    attempt = "ip link add eth0 type veth peer name eth1 && mount --bind /dev/null /etc/hosts"
    result = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", attempt], capture_output=True, text=True, timeout=60
    )
    return f"no namespaces: {result.stderr.strip()}" if result.returncode else ""


class Node:
    """One of the nodes.

    Attributes:
        name, address: what the nodes know it by.
        pid: a process in it.
    """

    def __init__(self, name: str, address: str, hosts: Path) -> None:
        self.name, self.address = name, address
        words = ["unshare", "--net", "--uts", "--mount", "sh", "-c", HOLD, "sh", name, str(hosts)]
        self._holder = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.pid = self._holder.pid
        if self._holder.stdout is None or self._holder.stdout.readline() != "up\n":
            self.close()
            raise RuntimeError(f"expected {name} to come up; see what it says above")

    def command(self, *words: object) -> list[str]:
        """Returns the command that runs these words in the node, in the current folder."""
        inside = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", f"--wd={Path.cwd()}"]
        return [*inside, *map(str, words)]

    def ip(self, *words: str) -> None:
        """Runs ip in the node."""
        subprocess.run(self.command("ip", *words), check=True)

    def close(self) -> None:
        """Ends the node, and every process in it."""
        self._holder.communicate()


class Nodes:
    """A context, and the nodes node0, node1, ... in it, as a sequence.

    Args:
        delay_seconds: of the link, one way; 0 for the kernel's own, of some microseconds.
    """

    def __init__(self, delay_seconds: float = 0.0) -> None:
        self._delay = delay_seconds
        self._stack = ExitStack()
        self._nodes: list[Node] = []

    def __enter__(self) -> Nodes:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nodes-")))
            places = [(f"node{i}", f"{PREFIX}{i + 1}") for i in range(2)]
            hosts = self.folder / "hosts"
            hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in places))
            for name, address in places:
                self._nodes.append(Node(name, address, hosts))
                stack.callback(self._nodes[-1].close)
            self._link(stack)
            for node in self:
                node.ip("address", "add", f"{node.address}/24", "dev", "eth0")
                node.ip("link", "set", "eth0", "up")
            self.ssh = self.folder / "ssh"
            cases = "\n  ".join(f"{node.name} | {node.address}) holder={node.pid} ;;" for node in self)
            self.ssh.write_text(SSH.format(cases=cases))
            self.ssh.chmod(0o755)
            self._stack = stack.pop_all()
        return self

    def _link(self, stack: ExitStack) -> None:
        pids = [str(node.pid) for node in self]
        if not self._delay:
            ends = ["eth0", "netns", pids[0], "type", "veth", "peer", "name", "eth0", "netns", pids[1]]
            subprocess.run(["ip", "link", "add", *ends], check=True)
            return
        words = [sys.executable, str(Path(__file__).with_name("link.py")), *pids, str(self._delay)]
        link = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        stack.callback(link.communicate)
        assert link.stdout is not None
        if link.stdout.readline() != b"up\n":
            raise RuntimeError("expected the link to come up; see what it says above")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __getitem__(self, index: int) -> Node:
        return self._nodes[index]

    def torchrun(self, *arguments: object, timeout: float = 100, **variables: str) -> list[tuple[int, str]]:
        """Runs launch/torchrun_nodes.sh with these arguments on each node; returns exit codes and what each said."""
        shared = {"NODES": str(len(self._nodes)), "MASTER_ADDR": self[0].name, "NPROC": "1"} | OURS | variables

        def start(index: int) -> tuple[int, str]:
            words = self[index].command(LAUNCH / "torchrun_nodes.sh", *arguments)
            return run(*words, timeout=timeout, NODE_RANK=str(index), **shared)

        with ThreadPoolExecutor(len(self._nodes)) as pool:
            return list(pool.map(start, range(len(self._nodes))))

    def mpirun(self, *arguments: object, timeout: float = 100, **variables: str) -> tuple[int, str]:
        """Runs launch/mpirun_openmpi.sh with these arguments, a rank on each node. See mpirun.run."""
        words = self[0].command(LAUNCH / "mpirun_openmpi.sh", *arguments)
        return run(*words, timeout=timeout, **self.mpi_environment() | variables)

    def mpi_environment(self) -> dict[str, str]:
        """Returns the variables with which the scripts in launch/ find mpirun, and that finds the nodes."""
        return OURS | {
            "NP": str(len(self._nodes)),
            "HOSTS": ",".join(f"{node.name}:1" for node in self._nodes),
            "MPIRUN": str(MPIRUN),
            "MPIRUN_OPTIONS": f"--prefix {Path(str(MPIRUN)).parent.parent}",  # where the other nodes find it
            "PRTE_MCA_plm_ssh_agent": str(self.ssh),
            "OMPI_MCA_plm_rsh_agent": str(self.ssh),  # version 4's name
            "OMPI_MCA_pml": "ob1",
            "OMPI_MCA_btl": "self,sm,tcp",
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program, and returns mpirun's exit code."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--delay-milliseconds D] SCRIPT | -m MODULE ...",
        description="Runs Python as two ranks of mpirun, one on each of two nodes.",
        allow_abbrev=False,
    )
    parser.add_argument("--delay-milliseconds", type=float, default=0.0, metavar="D", help="of the link, one way")
    parsed, words = parser.parse_known_args(arguments)
    with Nodes(parsed.delay_milliseconds / 1e3) as nodes:
        command = nodes[0].command(LAUNCH / "mpirun_openmpi.sh", *words)
        return subprocess.run(command, env=environment(**nodes.mpi_environment()), stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    reason = absence()
    sys.exit(f"expected to make namespaces; got {reason}: run it as root" if reason else main())
