/* echo: the floor under every QMP server. It greets, then answers each line with the same bytes, unread.
 *
 * usage: echo SOCKET
 * One client at a time, one thread, blocking: what a reply costs in sockets and scheduling alone.
 */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define VERSION "{\"qemu\": {\"micro\": 0, \"minor\": 1, \"major\": 11}, \"package\": \"echo\"}"
#define GREETING "{\"QMP\": {\"version\": " VERSION ", \"capabilities\": []}}\r\n"
#define REPLY "{\"return\": " VERSION "}\r\n"
#define BURST 1024 /* replies a write */

static char replies[BURST * (sizeof REPLY - 1)];
static char input[1 << 16];

static long lines_in(const char *data, long size)
{
    long lines = 0;
    const char *end = data + size;
    while ((data = memchr(data, '\n', end - data))) {
        data++;
        lines++;
    }
    return lines;
}

static void serve(int client)
{
    long size;
    if (write(client, GREETING, sizeof GREETING - 1) < 0)
        return;
    while ((size = read(client, input, sizeof input)) > 0)
        for (long owed = lines_in(input, size); owed > 0; owed -= BURST) {
            long now = owed < BURST ? owed : BURST;
            if (write(client, replies, now * (sizeof REPLY - 1)) < 0)
                return;
        }
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (argc != 2 || strlen(argv[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: echo SOCKET\n");
        return 2;
    }
    strcpy(address.sun_path, argv[1]);
    signal(SIGPIPE, SIG_IGN);
    for (int i = 0; i < BURST; i++)
        memcpy(replies + i * (sizeof REPLY - 1), REPLY, sizeof REPLY - 1);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 128)) {
        perror(argv[1]);
        return 1;
    }
    for (;;) {
        int client = accept(listener, NULL, NULL);
        if (client >= 0) {
            serve(client);
            close(client);
        }
    }
}
