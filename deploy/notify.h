/* notify.h: tells a service manager how we are, where one asked to be told (sd_notify's protocol).
 */
#ifndef BATON_NOTIFY_H
#define BATON_NOTIFY_H

/* state: "READY=1", "STOPPING=1". Without $NOTIFY_SOCKET, or if nobody listens, nothing happens. */
void notify(const char *state);

#endif
