/* preflight.h: what would keep a cluster from starting or from being fast, found before it starts.
 *
 * Every check prints one line: ok, warn (it will run, but badly or not for long) or FAIL (it will
 * not run), what was found, and after "fix:" what to do about it.
 */
#ifndef BATON_PREFLIGHT_H
#define BATON_PREFLIGHT_H

#include <stdio.h>

#include "deploy/plan.h"

/* Checks this machine against the plan. Returns how many checks failed. */
int preflight(const struct plan *p, FILE *out);

#endif
