#!/usr/bin/env bash
# Run a command inside a Slurm of this one machine, on loopback, and take Slurm down behind it:
#   tests/studies/slurm_here.sh FOLDER COMMAND [ARGUMENT ...]
# FOLDER (new or empty) receives configuration, state and logs. Needs Debian's slurm-wlm and munge.
# There is no accounting (no sacct), and time limits are looked at twice a minute.
set -euo pipefail
export PATH="$PATH:/usr/sbin"
mkdir -p "$1/state" "$1/spool"
folder=$(realpath "$1") host=$(hostname -s) me=$(id -un)
shift
chmod 0755 "$folder" # munged wants it so
dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none
chmod 0400 "$folder/munge.key"
# Requeued jobs wait for cred_expire seconds.
cat >"$folder/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=$me
SlurmdUser=$me
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=15
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN)
PartitionName=here Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
# No cgroup is made or entered with the plug-ins above; slurmd still loads a plug-in for them.
echo CgroupPlugin=cgroup/v1 >"$folder/cgroup.conf"
export SLURM_CONF="$folder/slurm.conf"

started=()
finish() {
  trap '' INT TERM
  scancel --quiet --user="$me" || true
  for _ in $(seq 40); do
    [ -n "$(squeue --noheader 2>/dev/null)" ] || break
    sleep 0.5
  done
  kill "${started[@]}" || true # the last one is munged, which the others need
  wait
}
trap finish EXIT
trap 'exit 130' INT TERM

# In sessions of their own: what stops this script and its command leaves them to `finish`.
setsid munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
  --seed-file="$folder/munged.seed" >"$folder/munged.out" 2>&1 &
started=($!)
setsid slurmctld -D >"$folder/slurmctld.log" 2>&1 &
started=($! "${started[@]}")
setsid slurmd -D >"$folder/slurmd.log" 2>&1 &
started=($! "${started[@]}")
for _ in $(seq 60); do
  [ "$(sinfo --noheader --format=%t 2>/dev/null)" != idle ] || break
  sleep 0.5
done
if [ "$(sinfo --noheader --format=%t 2>/dev/null)" != idle ]; then
  echo "Slurm does not start here: $(grep -h error "$folder"/*.log | tail -1)" >&2
  exit 1
fi
"$@"
