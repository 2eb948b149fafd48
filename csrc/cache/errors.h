// One exception type; `kind` names the class of mtserve.errors that Python sees.
#pragma once

#include <stdexcept>
#include <string>

namespace mtserve {

struct Error : std::runtime_error {
    Error(const char* kind, std::string field, const std::string& message)
        : std::runtime_error(message), kind(kind), field(std::move(field)) {}
    const char* kind;
    std::string field;
};

inline Error invalid_argument(std::string field, const std::string& message) {
    return Error("InvalidArgument", std::move(field), message);
}

inline Error failed_precondition(std::string field, const std::string& message) {
    return Error("FailedPrecondition", std::move(field), message);
}

inline Error resource_exhausted(std::string field, const std::string& message) {
    return Error("ResourceExhausted", std::move(field), message);
}

inline Error corrupt_state(std::string field, const std::string& message) {
    return Error("CorruptState", std::move(field), message);
}

}  // namespace mtserve
