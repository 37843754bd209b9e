/* What the examples share: every call is checked, times are taken. */
#ifndef PRISM_EXAMPLE_COMMON_H
#define PRISM_EXAMPLE_COMMON_H

#include <prism.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHECK(call)                                                                                \
    do {                                                                                           \
        int32_t status_ = (call);                                                                  \
        if (status_ != PRISM_OK) {                                                                 \
            fprintf(stderr, "%s: %s\n", prism_status_name(status_), prism_last_error());           \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static inline double seconds(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Reads `count` numbers between commas. */
static inline void numbers(const char *text, double *values, int count) {
    for (int i = 0; i < count; i++) {
        char *end;
        values[i] = strtod(text, &end);
        if (end == text || *end != (i + 1 == count ? '\0' : ',')) {
            fprintf(stderr, "'%s': expected %d numbers between commas\n", text, count);
            exit(2);
        }
        text = end + 1;
    }
}

static void print_message(void *user, const char *message) {
    (void)user;
    fprintf(stderr, "prism: %s\n", message);
}

#endif
