// The table of all ops (schema.cpp), for code that registers something for each of them.
#pragma once

namespace effk::binding {

struct OpSchema {
  const char* name;
  const char* signature;
};
extern const OpSchema kSchemas[];
extern const int kSchemaCount;

}  // namespace effk::binding
