package filter

// Every system call that the library knows is in exactly one of the lists
// below, on every architecture; a test holds it. What is in none, because it
// is younger than the library, is answered with ENOSYS: that is what programs
// and C libraries take for "this kernel has it not", and fall back from. The
// refused ones are answered with EPERM, as anybody without privileges is, so
// that a program says what is wrong and does not look for another way.

// allowed are the calls that shells, compilers, runtimes, debuggers and
// package managers live on. What the answer to a few more depends on
// stands in conditions.
const allowed = ofFiles + ofMemory + ofProcesses + ofWaiting + ofTalking

const ofFiles = `
access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 fallocate
fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat
fstatat fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr getxattrat inotify_add_watch inotify_init
inotify_init1 inotify_rm_watch lchown lgetxattr link linkat listmount listxattr listxattrat llistxattr lremovexattr lseek
lsetxattr lstat mkdir mkdirat mknod mknodat newfstatat open openat openat2 pread64 preadv preadv2 pwrite64 pwritev
pwritev2 read readahead readlink readlinkat readv removexattr removexattrat rename renameat renameat2 rmdir sendfile
setxattr setxattrat splice stat statfs statmount statx symlink symlinkat sync sync_file_range syncfs tee truncate umask
unlink unlinkat utime utimensat utimes vmsplice write writev
`

const ofMemory = `
brk cachestat get_mempolicy madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall
mmap mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease
remap_file_pages
`

// A process may trace others of its sandbox: debuggers, strace and the leak
// sanitizer do. Init cannot be traced, whatever its id, because it is not
// dumpable, and nobody else is there. Landlock and seccomp can be used to
// confine oneself further.
const ofProcesses = `
arch_prctl capget capset execve execveat exit exit_group fork get_robust_list get_thread_area getcpu getegid geteuid
getgid getgroups getpgid getpgrp getpid getppid getpriority getresgid getresuid getrlimit getrusage getsid gettid getuid
ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self pidfd_open pidfd_send_signal
prctl prlimit64 process_vm_readv process_vm_writev ptrace restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask
rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr
sched_setparam sched_setscheduler sched_yield seccomp set_robust_list set_thread_area set_tid_address setfsgid setfsuid
setgid setgroups setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setuid sigaltstack sysinfo
tgkill tkill uname uretprobe vfork wait4 waitid
`

const ofWaiting = `
alarm clock_getres clock_gettime clock_nanosleep epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait
eventfd eventfd2 futex futex_requeue futex_wait futex_waitv futex_wake getitimer getrandom gettimeofday io_cancel
io_destroy io_getevents io_pgetevents io_setup io_submit nanosleep pause pipe pipe2 poll ppoll pselect6 select setitimer
signalfd signalfd4 time timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create
timerfd_gettime timerfd_settime times
`

const ofTalking = `
accept accept4 bind connect getpeername getsockname getsockopt listen mq_getsetattr mq_notify mq_open mq_timedreceive
mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd recvfrom recvmmsg recvmsg semctl semget semop semtimedop sendmmsg
sendmsg sendto setsockopt shmat shmctl shmdt shmget shutdown
`

// refused are calls that no coding agent needs and that reach beyond a
// sandbox, change the system, or lead far into the kernel.
const refused = `
acct add_key adjtimex bpf chroot clock_adjtime clock_settime delete_module fanotify_init fanotify_mark finit_module
fsconfig fsmount fsopen fspick init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp
kexec_file_load kexec_load keyctl lookup_dcookie lsm_get_self_attr lsm_list_modules lsm_set_self_attr mbind
migrate_pages modify_ldt mount mount_setattr move_mount move_pages name_to_handle_at open_by_handle_at open_tree
open_tree_attr perf_event_open pidfd_getfd pivot_root process_madvise quotactl quotactl_fd reboot request_key
set_mempolicy set_mempolicy_home_node setdomainname sethostname setns settimeofday swapoff swapon syslog umount2 unshare
userfaultfd vhangup
`

// absent are answered with ENOSYS like those that nobody knows. The flags of
// clone3 lie in memory, where a filter cannot look; callers fall back to
// clone. The others are names that 64-bit kernels have never had or have no
// more.
const absent = `
clone3
_sysctl afs_syscall arch_specific_syscall create_module epoll_ctl_old epoll_wait_old get_kernel_syms getpmsg nfsservctl
putpmsg query_module security sysfs tuxcall uselib ustat vserver
clock_adjtime64 clock_getres_time64 clock_gettime64 clock_nanosleep_time64 clock_settime64 futex_time64
io_pgetevents_time64 mq_timedreceive_time64 mq_timedsend_time64 ppoll_time64 pselect6_time64 recvmmsg_time64
rt_sigtimedwait_time64 sched_rr_get_interval_time64 semtimedop_time64 timer_gettime64 timer_settime64 timerfd_gettime64
timerfd_settime64 utimensat_time64
`
