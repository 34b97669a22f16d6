# Runs a command in an image's files as a kubelet would with the chart's security context: a root
# that cannot be written, user 10001, no capabilities, no new privileges.
#
# enter.sh ROOT MODEL SPEC COMMAND...    in new namespaces: mount, net, pid, ipc
set -eu
root=$1 model=$2 spec=$3
shift 3
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
for folder in tmp home/moesaic cache; do
	mount -t tmpfs -o mode=0770,uid=10001,gid=10001 tmpfs "$root/$folder"
done
mount -t tmpfs -o mode=0755 tmpfs "$root/dev"
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777,size=1g tmpfs "$root/dev/shm"
for device in null zero full random urandom; do
	touch "$root/dev/$device"
	mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
mount -t proc proc "$root/proc"
mkdir "$root/tmp/model"
mount --bind "$model" "$root/tmp/model"
mount -o remount,bind,ro "$root/tmp/model"
cp "$spec" "$root/tmp/spec.yaml"
# Ray does not take loopback's own address for a cluster that others may join.
ip link set lo up
ip addr add 10.231.9.1/32 dev lo
exec chroot "$root" setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs \
	--inh-caps=-all --bounding-set=-all "$@"
