/* supervisor.h: runs a plan: starts its processes, keeps them running, ends them in order. */
#ifndef BATON_SUPERVISOR_H
#define BATON_SUPERVISOR_H

#include "deploy/plan.h"

/* Returns the exit code: 0 after a drain that was asked for, 2 when a setting or the model is
 * wrong, 1 when a role is left without workers. Everything started is gone by then. */
int supervise(const struct plan *p);

#endif
