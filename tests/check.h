/* check.h: assertions for tests: print both values and go on, exit non-zero at the end.
 *
 *   int main(void) { RUN(wire_round_trips); RUN(wire_refuses_cut_frames); return check_done(); }
 */
#ifndef BATON_CHECK_H
#define BATON_CHECK_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Atomic int check_failures, check_passes; /* threads may check too */

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (cond) {                                                                                \
            check_passes++;                                                                        \
        } else {                                                                                   \
            check_failures++;                                                                      \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #cond);                     \
        }                                                                                          \
    } while (0)

#define CHECK_INT(got, want)                                                                       \
    do {                                                                                           \
        long long got_ = (long long)(got), want_ = (long long)(want);                              \
        if (got_ == want_) {                                                                       \
            check_passes++;                                                                        \
        } else {                                                                                   \
            check_failures++;                                                                      \
            fprintf(stderr, "%s:%d: %s is %lld, want %lld\n", __FILE__, __LINE__, #got, got_,      \
                    want_);                                                                        \
        }                                                                                          \
    } while (0)

#define CHECK_STR(got, want)                                                                       \
    do {                                                                                           \
        const char *got_ = (got), *want_ = (want);                                                 \
        if (got_ && !strcmp(got_, want_)) {                                                        \
            check_passes++;                                                                        \
        } else {                                                                                   \
            check_failures++;                                                                      \
            fprintf(stderr, "%s:%d: %s is\n  \"%s\", want\n  \"%s\"\n", __FILE__, __LINE__, #got,  \
                    got_ ? got_ : "(null)", want_);                                                \
        }                                                                                          \
    } while (0)

/* Written so that NaN fails. */
#define CHECK_NEAR(got, want, tol)                                                                 \
    do {                                                                                           \
        double got_ = (got), want_ = (want), tol_ = (tol);                                         \
        if (fabs(got_ - want_) <= tol_) {                                                          \
            check_passes++;                                                                        \
        } else {                                                                                   \
            check_failures++;                                                                      \
            fprintf(stderr, "%s:%d: %s is %.9g, want %.9g +- %g\n", __FILE__, __LINE__, #got,      \
                    got_, want_, tol_);                                                            \
        }                                                                                          \
    } while (0)

#define CHECK_OK(call)                                                                             \
    do {                                                                                           \
        enum err err_ = (call);                                                                    \
        if (err_ == ERR_OK) {                                                                      \
            check_passes++;                                                                        \
        } else {                                                                                   \
            check_failures++;                                                                      \
            fprintf(stderr, "%s:%d: %s: %s: %s\n", __FILE__, __LINE__, #call, err_name(err_),      \
                    err_text(err_));                                                               \
        }                                                                                          \
    } while (0)

/* Stops the program: what follows would only repeat the same failure. */
#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        CHECK(cond);                                                                               \
        if (check_failures)                                                                        \
            exit(1);                                                                               \
    } while (0)

#define RUN(test)                                                                                  \
    do {                                                                                           \
        int before_ = check_failures;                                                              \
        test();                                                                                    \
        printf("%s %s\n", check_failures == before_ ? "ok  " : "FAIL", #test);                     \
    } while (0)

static inline int check_done(void)
{
    printf("%d checks, %d failed\n", check_passes + check_failures, check_failures);
    return check_failures ? 1 : 0;
}

#endif
