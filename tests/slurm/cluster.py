"""A real Slurm on this machine, for tests: a controller and nodes that are hosts of their own.

    python tests/slurm/cluster.py up [--nodes 2]     prints what to export; needs root and Debian's packages
    python tests/slurm/cluster.py down

Each node has its own network, process, host-name and mount namespaces, so that it can be cut off, killed or given a
bad disk without harm to the others. GPUs and most cores are only claimed: a job finds none.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "util-linux"]
FOLDER = Path("/tmp/megadual-slurm")
SUBNET = "10.219.44"  # .1 is the controller, .11, .12 ... are n1, n2 ...
BRIDGE = "megadual-br"


class Cluster:
    """Nodes n1, n2 ... in the partitions main (preempted by requeue) and urgent (preempts main)."""

    def __init__(self, nodes: int = 2, folder: Path = FOLDER):
        self.folder, self.nodes = folder, [f"n{i}" for i in range(1, nodes + 1)]
        self.conf = folder / "slurm.conf"

    def up(self) -> None:
        install()
        self.folder.mkdir(parents=True)
        for name in self.nodes:
            (self.folder / "nodes" / name).mkdir(parents=True)
        self._munge()
        self._network()
        self._configure()
        run("slurmctld", "-c", "-f", self.conf)
        for name in self.nodes:
            self.start_node(name)
        wait_for(lambda: self.states() == ["idle"] * len(self.nodes), 60, "the nodes")

    def down(self) -> None:
        for name in self.nodes:
            self.kill_node(name)
        for pid_file in (self.folder / "slurmctld.pid", self.folder / "munged.pid"):
            if pid_file.is_file():
                kill(int(pid_file.read_text()))
        for name in self.nodes:
            run("ip", "netns", "delete", self._netns(name), check=False)
        run("ip", "link", "delete", BRIDGE, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, name: str) -> None:
        """Boot a node: its first process is a shell, which reaps, and slurmd runs under it."""
        boot = (
            f"hostname {name}; mount --bind {self.folder}/hosts /etc/hosts; mount -t tmpfs tmpfs /dev/shm; "
            f"slurmd -D -N {name} -f {self.conf} & wait $!"
        )
        spaces = ["unshare", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        with open(self.folder / f"{name}.log", "ab") as log:
            node = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self._netns(name)}", *spaces, "bash", "-c", boot],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._pid_file(name).write_text(str(node.pid))

    def kill_node(self, name: str) -> None:
        """What a power cut does: all of the node's processes end at once."""
        if self._pid_file(name).is_file():
            kill(int(self._pid_file(name).read_text()), signal.SIGKILL)
            self._pid_file(name).unlink()

    def on_node(self, name: str, *command: str) -> str:
        """Run a command among the node's processes and mounts."""
        outside = self._pid_file(name).read_text()
        first = Path(f"/proc/{outside}/task/{outside}/children").read_text().strip()
        return self.output("nsenter", "--target", first, "--all", *command)

    def states(self) -> list[str]:
        return self.output("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()

    def output(self, *command) -> str:
        return run(*command, env=self.environment()).stdout

    def environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return clean | {"SLURM_CONF": str(self.conf)}

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": self.folder / "munge.sock", "pid-file": self.folder / "munged.pid"}
        files |= {"log-file": self.folder / "munged.log", "seed-file": self.folder / "munged.seed"}
        run("munged", "--force", *(f"--{option}={path}" for option, path in files.items()))

    def _network(self) -> None:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        hosts = ["127.0.0.1 localhost", f"{SUBNET}.1 {socket.gethostname()}"]
        for number, name in enumerate(self.nodes, 11):
            space, outer = self._netns(name), f"md-{name}"
            run("ip", "netns", "add", space)
            run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "link", "set", outer, "master", BRIDGE, "up")
            run("ip", "-n", space, "link", "set", "lo", "up")
            run("ip", "-n", space, "address", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
            run("ip", "-n", space, "link", "set", "eth0", "up")
            hosts.append(f"{SUBNET}.{number} {name}")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def _configure(self, gpus: int = 8) -> None:
        for gpu in range(gpus):  # Slurm only looks that they are devices
            (self.folder / f"gpu{gpu}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{gpus - 1}] Flags=nvidia_gpu_env\n")
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={SUBNET}.{number} "
            f"CPUs=128 RealMemory=1000000 Gres=gpu:{gpus}"
            for number, name in enumerate(self.nodes, 11)
        )
        self.conf.write_text(f"""
ClusterName=megadual
SlurmctldHost={socket.gethostname()}({SUBNET}.1)
SlurmctldPort=26817
SlurmdPort=26818
CommunicationParameters=NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.sock
CredType=cred/munge
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/nodes/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/nodes/%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/nodes/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SlurmdTimeout=10
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
""")

    def _netns(self, name: str) -> str:
        return f"megadual-{name}"

    def _pid_file(self, name: str) -> Path:
        return self.folder / f"{name}.pid"


def install() -> None:
    """Debian's Slurm, without its services being started."""
    if all(shutil.which(program) for program in ("slurmctld", "slurmd", "munged", "ip", "nsenter")):
        return
    if os.geteuid():
        raise SystemExit("error: tests/slurm starts a Slurm of its own, which needs root")
    policy = Path("/usr/sbin/policy-rc.d")
    had = policy.exists()
    if not had:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq", env=quiet)
    run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES, env=quiet)
    if not had:
        policy.unlink()


def run(*command, check: bool = True, env: dict | None = None) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def kill(pid: int, name: int = signal.SIGTERM) -> None:
    """Send a signal and wait for the end."""
    try:
        os.kill(pid, name)
        wait_for(lambda: not _lives(pid), 15)
    except ProcessLookupError:
        pass


def _lives(pid: int) -> bool:
    try:
        os.waitpid(pid, os.WNOHANG)  # where it is our child
    except ChildProcessError:
        pass
    return Path(f"/proc/{pid}").exists()


def wait_for(condition, seconds: float, what: str = "it"):
    """The condition's first true value; TimeoutError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.25)
    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("--nodes", type=int, default=2)
    args = parser.parse_args()
    cluster = Cluster(args.nodes)
    if args.action == "up":
        cluster.up()
        print(f"export SLURM_CONF={cluster.conf}")
    else:
        cluster.down()
