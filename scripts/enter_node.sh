#!/bin/sh
# What MPICH's mpiexec calls instead of ssh on the network of network.py:  enter_node.sh -x NODE COMMAND
while [ "${1#-}" != "$1" ]; do shift; done
node=$1 && shift
exec ip netns exec "$node" unshare --uts sh -c "hostname $node && exec $*"
