#include "faults.h"

#include "memory.h"

#include <cstdio>
#include <mutex>
#include <string>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

namespace emulator {

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static struct sigaction previous[4];
static unsigned char signal_stack[64 << 10];
// Of the thread that runs kernels.
static pid_t runner;

static void note(Code reason, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record_failure(reason, format, arguments);
    va_end(arguments);
}

static void note_fault(int signal, const siginfo_t& info) {
    void* address = info.si_addr;
    Block& block = *self->warp->block;
    ptrdiff_t offset = static_cast<unsigned char*>(address) - block.shared;
    if (signal == SIGFPE) {
        note(LAUNCH_FAILED, "division by zero");
    } else if (signal == SIGILL) {
        note(LAUNCH_FAILED, "illegal instruction");
    } else if (info.si_code == SI_KERNEL) {
        // The processor doesn't tell the misaligned address.
        note(MISALIGNED_ADDRESS, "an address that is not aligned, or no address");
    } else if (in_stack_guard(address)) {
        note(LAUNCH_FAILED, "stack overflow");
    } else if (offset >= -ptrdiff_t(PAGE) && offset < ptrdiff_t(block.shared_size + PAGE)) {
        note(ILLEGAL_ADDRESS, "is at %td of %u bytes of shared memory", offset, block.shared_size);
    } else {
        note(ILLEGAL_ADDRESS, "is at %p, %s", address, describe_address(address).c_str());
    }
}

static void on_signal(int signal, siginfo_t* info, void* context) {
    if (runner == 0 || runner != syscall(SYS_gettid) || self == nullptr) {
        // Not a kernel's fault: it recurs with the previous handler.
        for (int i = 0; i < 4; i++) {
            if (SIGNALS[i] == signal) sigaction(signal, &previous[i], nullptr);
        }
        return;
    }
    note_fault(signal, *info);
#ifdef FIBERS_IN_ASSEMBLY
    Context& host = leave();
    auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    machine.gregs[REG_RIP] = reinterpret_cast<greg_t>(host.pc);
    machine.gregs[REG_RSP] = reinterpret_cast<greg_t>(host.sp);
    machine.gregs[REG_RBP] = reinterpret_cast<greg_t>(host.fp);
#else
    machine.pc = reinterpret_cast<uintptr_t>(host.pc);
    machine.sp = reinterpret_cast<uintptr_t>(host.sp);
    machine.regs[29] = reinterpret_cast<uintptr_t>(host.fp);
#endif
#else
    fprintf(stderr, "CUDA emulator: %s\n", failure);
    _exit(70);
#endif
}

Faults::Faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &action, &previous[i]);
    });
    stack_t stack = {};
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, &previous_stack);
    runner = syscall(SYS_gettid);
}

Faults::~Faults() {
    runner = 0;
    sigaltstack(&previous_stack, nullptr);
}

}  // namespace emulator
