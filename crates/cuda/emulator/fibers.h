// Switches between stacks.
#pragma once

#if defined(__x86_64__) || defined(__aarch64__)
#define FIBERS_IN_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

#include <cstddef>
#include <cstdint>

namespace emulator {

#ifdef FIBERS_IN_ASSEMBLY

struct Context {
    void* pc;
    void* sp;
    void* fp;
};

// Clobbers all registers, so that the compiler saves what it needs. A jump instead of a call: lanes that arrive at the
// same place continue behind it, which the processor predicts.
[[gnu::always_inline]] inline void switch_context(Context& from, Context& to) {
    Context* left = &from;
    Context* entered = &to;
#if defined(__x86_64__)
    asm volatile(
        "leaq 1f(%%rip), %%rax\n\t"
        "movq %%rax, (%0)\n\t"
        "movq %%rsp, 8(%0)\n\t"
        "movq %%rbp, 16(%0)\n\t"
        "movq 8(%1), %%rsp\n\t"
        "movq 16(%1), %%rbp\n\t"
        "jmpq *(%1)\n"
        "1:"
        : "+D"(left), "+S"(entered)
        :
        : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2",
          "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
#ifdef __AVX512F__
          "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27",
          "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7",
#endif
          "memory", "cc");
#else
    register Context* x0 asm("x0") = left;
    register Context* x1 asm("x1") = entered;
    asm volatile(
        "adr x9, 1f\n\t"
        "mov x10, sp\n\t"
        "stp x9, x10, [x0]\n\t"
        "str x29, [x0, #16]\n\t"
        "ldp x9, x10, [x1]\n\t"
        "ldr x29, [x1, #16]\n\t"
        "mov sp, x10\n\t"
        "br x9\n"
        "1:"
        : "+r"(x0), "+r"(x1)
        :
        : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17", "x18",
          "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30", "v0", "v1", "v2", "v3", "v4",
          "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20",
          "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31", "memory", "cc");
#endif
}

// The entry must not return.
inline void start_context(Context& context, unsigned char*, unsigned char* top, void (*entry)()) {
    context.pc = reinterpret_cast<void*>(entry);
    context.fp = nullptr;
#if defined(__x86_64__)
    // The alignment after a call.
    top -= 8;
    *reinterpret_cast<void**>(top) = nullptr;
#endif
    context.sp = top;
}

#else

// Slow: every switch is a system call.
struct Context {
    ucontext_t state;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void start_context(Context& context, unsigned char* bottom, unsigned char* top, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = bottom;
    context.state.uc_stack.ss_size = top - bottom;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}

#endif

}  // namespace emulator
