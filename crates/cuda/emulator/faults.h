// Tells which thread of a kernel touched memory that isn't there, and ends the launch.
#pragma once

#include "machine.h"

#include <csignal>
#include <cstdarg>

namespace emulator {

// While it lives, the calling thread's faults are those of kernels.
class Faults {
public:
    Faults();
    ~Faults();
    Faults(const Faults&) = delete;

private:
    stack_t previous_stack;
};

// Of the machine: what went wrong in the lane that runs, and where its launch goes on.
void note_failure(Code reason, const char* format, va_list arguments);
Context& leave();
bool in_stack_guard(const void* address);

}  // namespace emulator
