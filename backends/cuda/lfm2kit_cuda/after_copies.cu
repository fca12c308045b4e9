// What is launched between a wait for another stream and kernels that are launched early.

// A kernel that is launched early waits for the kernel ahead of it, and is not known to wait for
// anything else.  This one is not launched early: when it runs, all that its stream waits for is over.
extern "C" __global__ void after_copies() {}
