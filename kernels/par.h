/* par.h: what the references need to know about the pool that runs them. */
#ifndef BATON_PAR_H
#define BATON_PAR_H

/* Index of the calling thread in its pool, in [0, par_threads); 0 for the one that calls par_for.
 */
int par_self(void);

#endif
