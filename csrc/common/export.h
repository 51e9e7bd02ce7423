// Everything is built with hidden visibility; EFFK_EXPORT marks the few functions that `effk._C` calls in the op library.
#pragma once

#if defined(__GNUC__) || defined(__clang__)
#define EFFK_EXPORT __attribute__((visibility("default")))
#else
#define EFFK_EXPORT
#endif
