/* client: time a QMP server from one thread, with bytes prepared in advance, so that little of the time is its own.
 *
 * usage: client [-s] [-n ROUNDS] [-w ROUNDS] [-t SECONDS] [-d DEPTH] [-e] [-g COUNT] [-a LINE] SOCKET LINE...
 *        client -c [-n ROUNDS] [-w ROUNDS] SOCKET
 *
 * A round sends the LINEs and waits: for each reply before the next line is sent, or with -d for all replies to
 * the LINEs sent DEPTH times in one write; '@' in a line is the number of its repetition, from 0.
 * With -e each LINE sent DEPTH times is a write of its own, and its replies are waited for before the next one.
 * With -c a round is: connect, greeting, negotiation, close.
 *   -n  rounds that are timed   -w  rounds before them   -t  end after so many seconds anyway
 *   -g, -a  send LINE so many times first, '@' counting (to fill the server)
 *   -s  poll busily instead of sleeping, so that waking up this program is not part of the time
 * SIGTERM ends it after the round.
 * Prints a JSON object: p50, p99, max (microseconds a round), rate (replies a second in the median round), replies,
 * errors, wall and cpu (seconds; cpu is what this program used).
 * A write is never larger than what socket buffers hold together with its replies: so it cannot deadlock.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define NEGOTIATE "{\"execute\": \"qmp_capabilities\"}\n"
#define FILL_DEPTH 64   /* lines a write while filling */
#define HANG_SECONDS 60 /* a server that does not answer for so long ends the run */

static struct {
    int connects, spins, each;
    long rounds, warm_up, depth, fill;
    double seconds;
    const char *fill_line, *socket;
    char **lines;
    int line_count;
} options = {.rounds = 1000, .seconds = 60};

static volatile sig_atomic_t ending;
static long replies, errors; /* seen so far; events are not counted */

static void fail(const char *what)
{
    fprintf(stderr, "client: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* Seconds of a clock. */
static double clock_seconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static double monotonic(void)
{
    return clock_seconds(CLOCK_MONOTONIC);
}

/* ---- one connection ------------------------------------------------------------------------------------ */

static char input[1 << 20];
static char head[16]; /* how the line that is being received begins */
static size_t head_size;

/* Count the replies that end in `data`; what follows the last line feed begins the next one. */
static void count_replies(const char *data, const char *end)
{
    while (data < end) {
        const char *feed = memchr(data, '\n', end - data);
        size_t size = (feed ? feed : end) - data, room = sizeof head - head_size;
        memcpy(head + head_size, data, size < room ? size : room);
        head_size += size < room ? size : room;
        if (!feed)
            return;
        if (head_size < 12 || memcmp(head, "{\"timestamp\"", 12)) {
            replies++;
            errors += head_size >= 8 && !memcmp(head, "{\"error\"", 8);
        }
        head_size = 0;
        data = feed + 1;
    }
}

static void wait_replies(int server, long until)
{
    while (replies < until) {
        long size = recv(server, input, sizeof input, options.spins ? MSG_DONTWAIT : 0);
        if (size > 0)
            count_replies(input, input + size);
        else if (size == 0 || (errno != EAGAIN && errno != EINTR))
            fail("the server went away");
    }
}

static void send_all(int server, const char *data, size_t size)
{
    while (size) {
        long sent = send(server, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR)
            fail("send");
        if (sent > 0) {
            data += sent;
            size -= sent;
        }
    }
}

static int open_connection(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, options.socket, sizeof address.sun_path - 1);
    if (connect(server, (struct sockaddr *)&address, sizeof address))
        fail(options.socket);
    head_size = 0;
    wait_replies(server, replies + 1);
    send_all(server, NEGOTIATE, sizeof NEGOTIATE - 1);
    wait_replies(server, replies + 1);
    return server;
}

/* ---- what is sent -------------------------------------------------------------------------------------- */

struct message {
    char *data;
    size_t size;
    long lines;
};

/* Append a line, its '@' replaced by `number`. */
static void append(struct message *message, const char *line, long number)
{
    message->data = realloc(message->data, message->size + strlen(line) + 32);
    char *out = message->data + message->size;
    for (; *line; line++)
        if (*line == '@')
            out += sprintf(out, "%ld", number);
        else
            *out++ = *line;
    *out++ = '\n';
    message->size = out - message->data;
    message->lines++;
}

static void ask(int server, const struct message *message)
{
    long before = replies;
    send_all(server, message->data, message->size);
    wait_replies(server, before + message->lines);
}

static void fill(int server)
{
    for (long number = 0; number < options.fill;) {
        struct message message = {0};
        while (number < options.fill && message.lines < FILL_DEPTH)
            append(&message, options.fill_line, number++);
        ask(server, &message);
        free(message.data);
    }
    if (errors) {
        fprintf(stderr, "client: the server refused %ld of %ld '%s'\n", errors, options.fill, options.fill_line);
        exit(1);
    }
}

/* The messages of a round: one a line, or all in one; returns how many. */
static int prepare(struct message *messages)
{
    int in_one = options.depth && !options.each;
    for (long number = 0; number < (options.depth ? options.depth : 1); number++)
        for (int i = 0; i < options.line_count; i++)
            append(&messages[in_one ? 0 : i], options.lines[i], number);
    return in_one ? 1 : options.line_count;
}

/* ---- measuring ----------------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void one_round(int server, const struct message *messages, int count)
{
    if (options.connects)
        close(open_connection());
    for (int i = 0; i < count; i++)
        ask(server, &messages[i]);
}

static void measure(int server, const struct message *messages, int count)
{
    double *taken = calloc(options.rounds, sizeof *taken);
    for (long i = 0; i < options.warm_up; i++)
        one_round(server, messages, count);
    replies = errors = 0;
    double cpu = clock_seconds(CLOCK_PROCESS_CPUTIME_ID), start = monotonic(), last = start;
    long rounds = 0;
    while (rounds < options.rounds && last - start < options.seconds && !ending) {
        one_round(server, messages, count);
        double now = monotonic();
        taken[rounds++] = now - last;
        last = now;
    }
    cpu = clock_seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    qsort(taken, rounds, sizeof *taken, ascending);
    double median = taken[rounds / 2];
    printf("{\"p50\": %.3f, \"p99\": %.3f, \"max\": %.3f, \"rate\": %.1f, \"replies\": %ld, \"errors\": %ld, \"wall\": %.6f, "
           "\"cpu\": %.6f}\n", median * 1e6, taken[rounds * 99 / 100] * 1e6, taken[rounds - 1] * 1e6, replies / (double)rounds / median,
           replies, errors, last - start, cpu);
}

static void end(int signal)
{
    ending = 1;
}

static int usage(void)
{
    fprintf(stderr, "usage: client [-s] [-c] [-n ROUNDS] [-w ROUNDS] [-t SECONDS] [-d DEPTH] [-e] [-g COUNT] [-a LINE]"
                    " SOCKET [LINE...]\n");
    return 2;
}

int main(int argc, char **argv)
{
    for (int option; (option = getopt(argc, argv, "+scen:w:t:d:g:a:")) != -1;)
        switch (option) {
        case 's': options.spins = 1; break;
        case 'e': options.each = 1; break;
        case 'c': options.connects = 1; break;
        case 'n': options.rounds = atol(optarg); break;
        case 'w': options.warm_up = atol(optarg); break;
        case 't': options.seconds = atof(optarg); break;
        case 'd': options.depth = atol(optarg); break;
        case 'g': options.fill = atol(optarg); break;
        case 'a': options.fill_line = optarg; break;
        default: return usage();
        }
    options.lines = argv + optind + 1;
    options.line_count = argc - optind - 1;
    if (options.line_count < !options.connects || options.rounds < 1 || (options.fill && !options.fill_line))
        return usage();
    options.socket = argv[optind];
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = end}, NULL);
    alarm(options.seconds + HANG_SECONDS);

    struct message *messages = calloc(options.line_count + 1, sizeof *messages);
    int count = options.connects ? 0 : prepare(messages);
    int server = options.connects ? -1 : open_connection();
    fill(server);
    measure(server, messages, count);
    return 0;
}
