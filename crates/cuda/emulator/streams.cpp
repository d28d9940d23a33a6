// Streams, events and graphs.
#include "driver.h"

namespace driver {

static Stream default_stream;
// Never destroyed, as threads may still use streams while the program exits.
static auto& streams = *new std::set<Stream*>;
static auto& events = *new std::set<Event*>;
static auto &graphs = *new std::set<Graph*>, &executables = *new std::set<Graph*>;

Stream* find_stream(void* handle) {
    // 1 and 2 are the default streams too.
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return &default_stream;
    auto* stream = static_cast<Stream*>(handle);
    return streams.contains(stream) ? stream : nullptr;
}

CUresult enqueue(void* handle, Action action) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return report_error(INVALID_HANDLE, "a stream that does not exist");
    if (stream->invalid) return CAPTURE_INVALIDATED;
    if (stream->graph == nullptr) return action();
    stream->graph->actions.push_back(std::move(action));
    return SUCCESS;
}

CUresult check_not_capturing() {
    for (Stream* stream : streams) {
        if (stream->graph == nullptr) continue;
        bool forbidden = stream->mode == 0 || (stream->mode == 1 && stream->thread == std::this_thread::get_id());
        if (!forbidden) continue;
        stream->invalid = true;
        return report_error(CAPTURE_UNSUPPORTED, "a call that is not allowed while a stream captures");
    }
    return SUCCESS;
}

}  // namespace driver

using namespace driver;

DRIVER cuStreamCreate(Stream** stream, unsigned) {
    ENTER;
    *stream = new Stream;
    streams.insert(*stream);
    return SUCCESS;
}

DRIVER cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }

DRIVER cuStreamDestroy_v2(Stream* stream) {
    ENTER;
    if (streams.erase(stream) == 0) return INVALID_HANDLE;
    delete stream->graph;
    delete stream;
    return SUCCESS;
}

DRIVER cuStreamSynchronize(void* handle) {
    ENTER;
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (stream->graph != nullptr) {
        stream->invalid = true;
        return CAPTURE_UNSUPPORTED;
    }
    emulator::check_ends();
    return SUCCESS;
}

DRIVER cuStreamQuery(void* handle) { return cuStreamSynchronize(handle); }

DRIVER cuStreamWaitEvent(void* handle, Event* event, unsigned) {
    ENTER;
    Stream* stream = find_stream(handle);
    if (stream == nullptr || !events.contains(event)) return INVALID_HANDLE;
    if (stream->graph == event->graph || !event->recorded) return SUCCESS;
    if (stream->graph == nullptr) return report_error(NOT_SUPPORTED, "a capture that forks");
    stream->invalid = true;
    return report_error(CAPTURE_ISOLATION, "a stream that captures waits for what is not captured");
}

DRIVER cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
    ENTER;
    return enqueue(stream, [=] {
        function(data);
        return SUCCESS;
    });
}

DRIVER cuEventCreate(Event** event, unsigned) {
    ENTER;
    *event = new Event;
    events.insert(*event);
    return SUCCESS;
}

DRIVER cuEventDestroy_v2(Event* event) {
    ENTER;
    if (events.erase(event) == 0) return INVALID_HANDLE;
    delete event;
    return SUCCESS;
}

DRIVER cuEventRecord(Event* event, void* handle) {
    ENTER;
    Stream* stream = find_stream(handle);
    if (stream == nullptr || !events.contains(event)) return INVALID_HANDLE;
    event->recorded = true;
    event->graph = stream->graph;
    event->time = std::chrono::steady_clock::now();
    return SUCCESS;
}

DRIVER cuEventRecordWithFlags(Event* event, void* stream, unsigned) { return cuEventRecord(event, stream); }

DRIVER cuEventSynchronize(Event* event) {
    ENTER;
    if (!events.contains(event)) return INVALID_HANDLE;
    return event->graph == nullptr ? SUCCESS : CAPTURED_EVENT;
}

DRIVER cuEventQuery(Event* event) { return cuEventSynchronize(event); }

DRIVER cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
    ENTER;
    if (!events.contains(start) || !events.contains(end)) return INVALID_HANDLE;
    if (!start->recorded || !end->recorded) return INVALID_HANDLE;
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return SUCCESS;
}

DRIVER cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    return cuEventElapsedTime(milliseconds, start, end);
}

DRIVER cuStreamBeginCapture_v2(Stream* stream, int mode) {
    ENTER;
    if (find_stream(stream) == nullptr) return INVALID_HANDLE;
    if (!streams.contains(stream)) return CAPTURE_UNSUPPORTED;
    if (stream->graph != nullptr) return INVALID_VALUE;
    stream->graph = new Graph;
    stream->mode = mode;
    stream->thread = std::this_thread::get_id();
    return SUCCESS;
}

DRIVER cuStreamEndCapture(Stream* stream, Graph** graph) {
    ENTER;
    *graph = nullptr;
    if (!streams.contains(stream) || stream->graph == nullptr) return INVALID_VALUE;
    // Except in relaxed mode.
    if (stream->mode != 2 && stream->thread != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    Graph* captured = stream->graph;
    bool invalid = stream->invalid;
    stream->graph = nullptr;
    stream->invalid = false;
    if (invalid) {
        delete captured;
        return CAPTURE_INVALIDATED;
    }
    graphs.insert(captured);
    *graph = captured;
    return SUCCESS;
}

DRIVER cuStreamIsCapturing(void* handle, int* status) {
    ENTER;
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    *status = stream->graph == nullptr ? 0 : stream->invalid ? 2 : 1;
    return SUCCESS;
}

DRIVER cuGraphGetNodes(Graph* graph, void** nodes, size_t* count) {
    ENTER;
    if (!graphs.contains(graph)) return INVALID_VALUE;
    if (nodes != nullptr) return NOT_SUPPORTED;
    *count = graph->actions.size();
    return SUCCESS;
}

DRIVER cuGraphDestroy(Graph* graph) {
    ENTER;
    if (graphs.erase(graph) == 0) return INVALID_VALUE;
    delete graph;
    return SUCCESS;
}

DRIVER cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) {
    ENTER;
    if (!graphs.contains(graph)) return INVALID_VALUE;
    *executable = new Graph(*graph);
    executables.insert(*executable);
    return SUCCESS;
}

DRIVER cuGraphUpload(Graph* executable, void*) {
    ENTER;
    return executables.contains(executable) ? SUCCESS : INVALID_VALUE;
}

DRIVER cuGraphExecDestroy(Graph* executable) {
    ENTER;
    if (executables.erase(executable) == 0) return INVALID_VALUE;
    delete executable;
    return SUCCESS;
}

DRIVER cuGraphLaunch(Graph* executable, void* stream) {
    ENTER;
    if (!executables.contains(executable)) return INVALID_VALUE;
    for (const Action& action : executable->actions) {
        if (CUresult error = enqueue(stream, action)) return error;
    }
    return SUCCESS;
}
