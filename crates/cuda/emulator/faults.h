// Reports the thread of a kernel that touched unmapped memory, and ends the launch.
#pragma once

#include "machine.h"

#include <csignal>
#include <cstdarg>

namespace emulator {

// Faults of the calling thread are a kernel's during its lifetime.
class Faults {
public:
    Faults();
    ~Faults();
    Faults(const Faults&) = delete;

private:
    stack_t previous_stack;
};

// Defined by the machine: records the running lane's error, and returns the context to continue in.
void record_failure(Code reason, const char* format, va_list arguments);
Context& leave();
bool in_stack_guard(const void* address);

}  // namespace emulator
