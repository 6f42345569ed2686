/* A fleet of devices that ask a gateway, in one process: what it measures is printed as one line of JSON.

       mqtt_load --port 1883 --site bench --payloads FILE --seconds 5 [--outstanding 64 | --rate 1000]

   Closed loop: each reply lets its device ask the next question, so that `outstanding` are under way. Open loop: question
   i is due at start + i / rate whatever the replies do, and its latency counts from then, so that a stall is charged to
   every question that it delays. The payloads (see payloads.py) are used in turn; payload i is of device i % devices. */
#include "mqtt.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
    SLOTS = 1 << 16, /* questions under way; a power of two */
    EVENTS = 256,
    MAX_RATE_BURST = 1024,
    STATUS_OK = 1,
    STATUS_RESOURCE_EXHAUSTED = 4,
    DRAIN_NS = 1000000000,
    TICK_MS = 20,
};
static const int64_t SECOND_NS = 1000000000;

struct options {
    const char *host, *port, *site, *prefix, *payloads;
    double seconds, rate;
    int devices, outstanding, qos;
    int64_t count;
};

struct device {
    struct client client;
    char topic[256];
    uint32_t next_payload;
    bool wants_write;
};

/* A question under way. `number` tells it from the one that had the slot before. */
struct slot {
    uint64_t number;
    int64_t since_ns;
    bool is_open;
};

struct tally {
    uint64_t sent, answered, in_time, errors, exhausted, strays, unsent;
    uint32_t *latencies; /* tenths of a microsecond */
    size_t capacity;
};

static struct options options = {"127.0.0.1", "1883", "bench", "cam", NULL, 5.0, 0.0, 64, 64, 1, INT64_MAX};
static struct device *devices;
static struct span *payloads;
static uint32_t payload_count;
static uint8_t properties[256];
static size_t properties_size;
static struct slot slots[SLOTS];
static struct tally tally;
static int poller;
static int64_t end_ns;

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND_NS + now.tv_nsec;
}

/* -- preparation --------------------------------------------------------------------------------------------------- */

/* u32 count, then for each payload u32 size and its bytes; little-endian. */
static void load_payloads(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) die("%s: %s", path, strerror(errno));
    if (fread(&payload_count, 4, 1, file) != 1 || payload_count == 0) die("%s: no payloads", path);
    payloads = calloc(payload_count, sizeof *payloads);
    for (uint32_t i = 0; i < payload_count; i++) {
        uint32_t size;
        if (fread(&size, 4, 1, file) != 1) die("%s ends early", path);
        uint8_t *data = malloc(size);
        if (fread(data, 1, size, file) != size) die("%s ends early", path);
        payloads[i] = (struct span){data, size};
    }
    fclose(file);
    if (payload_count < (uint32_t)options.devices) die("%s: fewer payloads than devices", path);
}

static void encode_properties(void) {
    properties_size = encode_string_property(properties, 0x03, "application/x-protobuf", NULL);
    properties_size +=
        encode_string_property(properties + properties_size, 0x26, "schema", "shoal.v1.InferenceRequest");
    memcpy(properties + properties_size, (uint8_t[]){0x02, 0, 0, 0, 10}, 5); /* expiry: the device's retry interval */
    properties_size += 5;
}

static void connect_devices(void) {
    devices = calloc((size_t)options.devices, sizeof *devices);
    for (int i = 0; i < options.devices; i++) {
        struct device *device = &devices[i];
        char name[64], replies[256];
        snprintf(name, sizeof name, "%s%02d", options.prefix, i);
        snprintf(device->topic, sizeof device->topic, "shoal/v1/up/%s/%s/infer", options.site, name);
        snprintf(replies, sizeof replies, "shoal/v1/down/%s/%s/reply", options.site, name);
        device->next_payload = (uint32_t)i;
        client_connect(&device->client, options.host, options.port, name, UINT16_MAX);
        client_subscribe(&device->client, replies, (uint8_t)options.qos);
        epoll_ctl(poller, EPOLL_CTL_ADD, device->client.fd, &(struct epoll_event){EPOLLIN, {.ptr = device}});
    }
}

/* -- questions ----------------------------------------------------------------------------------------------------- */

static void flush(struct device *device) {
    bool wants_write = !client_flush(&device->client);
    if (wants_write == device->wants_write) return;
    device->wants_write = wants_write;
    uint32_t events = wants_write ? EPOLLIN | EPOLLOUT : EPOLLIN;
    epoll_ctl(poller, EPOLL_CTL_MOD, device->client.fd, &(struct epoll_event){events, {.ptr = device}});
}

/* Puts the next question into the device's buffer. One that finds no room is counted, not sent. */
static void ask(struct device *device, int64_t since_ns) {
    uint64_t number = tally.sent + tally.unsent;
    struct slot *slot = &slots[number % SLOTS];
    if (slot->is_open || device->client.unacked >= device->client.receive_maximum) {
        tally.unsent++;
        return;
    }
    *slot = (struct slot){number, since_ns, true};
    tally.sent++;
    uint8_t correlation[8];
    for (int i = 0; i < 8; i++) correlation[i] = (uint8_t)(number >> (56 - 8 * i));
    struct span topic = {(const uint8_t *)device->topic, strlen(device->topic)};
    struct span payload = payloads[device->next_payload];
    put_publish(&device->client, topic, (uint8_t)options.qos, (struct span){properties, properties_size},
                (struct span){correlation, 8}, payload);
    device->next_payload += (uint32_t)options.devices;
    if (device->next_payload >= payload_count) device->next_payload %= (uint32_t)options.devices;
}

static bool may_ask(int64_t now) { return now < end_ns && (int64_t)(tally.sent + tally.unsent) < options.count; }

/* -- replies ------------------------------------------------------------------------------------------------------- */

static bool read_varint(struct span *rest, uint64_t *value) {
    *value = 0;
    for (int shift = 0; rest->size > 0 && shift < 64; shift += 7) {
        uint8_t byte = *rest->data;
        *rest = (struct span){rest->data + 1, rest->size - 1};
        *value |= (uint64_t)(byte & 0x7F) << shift;
        if (!(byte & 0x80)) return true;
    }
    return false;
}

/* Takes one protobuf field; `inner` is set for length-delimited ones, `value` for varints. False at the end, or on
   bytes that are no protobuf, which leave `rest` not empty. */
static bool next_field(struct span *rest, uint64_t *key, uint64_t *value, struct span *inner) {
    if (!read_varint(rest, key)) return false;
    uint64_t size = 0;
    switch (*key & 7) {
        case 0: return read_varint(rest, value);
        case 1: size = 8; break;
        case 2: if (!read_varint(rest, &size)) return false; break;
        case 5: size = 4; break;
        default: return false;
    }
    if (size > rest->size) return false;
    *inner = (struct span){rest->data, size};
    *rest = (struct span){rest->data + size, rest->size - size};
    return true;
}

/* The status of an InferenceReply: of its first row, field 3, whose status, field 2, is not OK; OK where all are. Negative
   where it has no rows or is no reply. */
static int64_t status_of(struct span reply) {
    uint64_t key, value, rows = 0, found = STATUS_OK;
    struct span row;
    while (reply.size > 0) {
        if (!next_field(&reply, &key, &value, &row)) return -1;
        if (key != (3 << 3 | 2)) continue;
        rows++;
        uint64_t status = 0;
        struct span ignored;
        while (row.size > 0) {
            if (!next_field(&row, &key, &value, &ignored)) return -1;
            if (key == (2 << 3)) status = value;
        }
        if (found == STATUS_OK) found = status;
    }
    return rows > 0 ? (int64_t)found : -1;
}

static void remember(int64_t latency_ns) {
    if (tally.answered == tally.capacity) {
        tally.capacity = tally.capacity ? 2 * tally.capacity : 1 << 20;
        tally.latencies = realloc(tally.latencies, tally.capacity * sizeof *tally.latencies);
        if (tally.latencies == NULL) die("out of memory");
    }
    tally.latencies[tally.answered++] = (uint32_t)(latency_ns / 100);
}

static void hear(const struct publish *reply, int64_t now) {
    uint64_t number = 0;
    for (size_t i = 0; i < reply->correlation.size; i++) number = number << 8 | reply->correlation.data[i];
    struct slot *slot = &slots[number % SLOTS];
    if (reply->correlation.size != 8 || !slot->is_open || slot->number != number) {
        tally.strays++; /* a second answer, or to nothing that was asked */
        return;
    }
    slot->is_open = false;
    tally.in_time += now < end_ns;
    int64_t status = status_of(reply->payload);
    tally.errors += status != STATUS_OK;
    tally.exhausted += status == STATUS_RESOURCE_EXHAUSTED;
    remember(now - slot->since_ns);
}

static void serve(struct device *device) {
    client_read(&device->client);
    int64_t now = now_ns();
    struct packet packet;
    while (client_next(&device->client, &packet)) {
        struct publish reply;
        if (packet.type != PUBLISH || !parse_publish(&packet, &reply)) die("a packet that is no reply");
        if (reply.qos) put_puback(&device->client, reply.id);
        hear(&reply, now);
        if (options.rate == 0 && may_ask(now)) ask(device, now_ns());
    }
    flush(device);
}

/* -- the run ------------------------------------------------------------------------------------------------------- */

static int64_t due_ns(int64_t start, uint64_t number) {
    return start + (int64_t)((double)number * (double)SECOND_NS / options.rate);
}

/* Open loop: ask what is due, then set the timer for what comes next. */
static void ask_due(int timer, int64_t start) {
    uint64_t expirations;
    if (read(timer, &expirations, sizeof expirations) < 0 && errno != EAGAIN) die("timer: %s", strerror(errno));
    for (int burst = 0; burst < MAX_RATE_BURST; burst++) {
        int64_t now = now_ns();
        uint64_t number = tally.sent + tally.unsent;
        int64_t due = due_ns(start, number);
        if (due > now || !may_ask(due)) break;
        struct device *device = &devices[number % (uint64_t)options.devices];
        ask(device, due);
        flush(device);
    }
    int64_t next = due_ns(start, tally.sent + tally.unsent);
    if (!may_ask(next)) return;
    struct itimerspec when = {.it_value = {next / SECOND_NS, next % SECOND_NS}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
}

static void ask_first(void) {
    for (int i = 0; i < options.outstanding && may_ask(now_ns()); i++) {
        struct device *device = &devices[i % options.devices];
        ask(device, now_ns());
        flush(device);
    }
}

static int64_t run(void) {
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    int64_t start = now_ns();
    end_ns = start + (int64_t)(options.seconds * (double)SECOND_NS);
    if (options.rate > 0) {
        epoll_ctl(poller, EPOLL_CTL_ADD, timer, &(struct epoll_event){EPOLLIN, {.ptr = NULL}});
        ask_due(timer, start);
    } else {
        ask_first();
    }
    for (;;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(poller, events, EVENTS, TICK_MS);
        for (int i = 0; i < ready; i++) {
            if (events[i].data.ptr == NULL) {
                ask_due(timer, start);
            } else {
                serve(events[i].data.ptr);
            }
        }
        int64_t now = now_ns();
        bool is_done = tally.answered == tally.sent && !may_ask(now);
        if (is_done || now > end_ns + DRAIN_NS) return (now < end_ns ? now : end_ns) - start;
    }
}

static int compare(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

static double percentile_us(double share) {
    if (tally.answered == 0) return 0;
    size_t index = (size_t)(share * (double)tally.answered);
    return tally.latencies[index < tally.answered ? index : tally.answered - 1] / 10.0;
}

static double cpu_s(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static void report(int64_t took_ns, double cpu) {
    double seconds = (double)took_ns / (double)SECOND_NS;
    qsort(tally.latencies, tally.answered, sizeof *tally.latencies, compare);
    printf("{\"requests\": %llu, \"answered\": %llu, \"seconds\": %.4f, \"rps\": %.1f, \"p50_us\": %.1f, "
           "\"p99_us\": %.1f, \"p999_us\": %.1f, \"cpu_s\": %.4f, \"errors\": %llu, \"exhausted\": %llu, "
           "\"unanswered\": %llu, \"strays\": %llu, \"unsent\": %llu}\n",
           (unsigned long long)tally.sent, (unsigned long long)tally.answered, seconds,
           (double)tally.in_time / seconds, percentile_us(0.5), percentile_us(0.99), percentile_us(0.999), cpu,
           (unsigned long long)tally.errors, (unsigned long long)tally.exhausted,
           (unsigned long long)(tally.sent - tally.answered),
           (unsigned long long)tally.strays, (unsigned long long)tally.unsent);
}

static void parse_options(int count, char **arguments) {
    static const struct option known[] = {
        {"host", 1, NULL, 'h'},    {"port", 1, NULL, 'p'},    {"site", 1, NULL, 's'},
        {"prefix", 1, NULL, 'x'},  {"payloads", 1, NULL, 'f'}, {"seconds", 1, NULL, 't'},
        {"rate", 1, NULL, 'r'},    {"devices", 1, NULL, 'd'}, {"outstanding", 1, NULL, 'o'},
        {"qos", 1, NULL, 'q'},     {"count", 1, NULL, 'n'},   {NULL, 0, NULL, 0},
    };
    int option;
    while ((option = getopt_long(count, arguments, "", known, NULL)) != -1) {
        switch (option) {
            case 'h': options.host = optarg; break;
            case 'p': options.port = optarg; break;
            case 's': options.site = optarg; break;
            case 'x': options.prefix = optarg; break;
            case 'f': options.payloads = optarg; break;
            case 't': options.seconds = atof(optarg); break;
            case 'r': options.rate = atof(optarg); break;
            case 'd': options.devices = atoi(optarg); break;
            case 'o': options.outstanding = atoi(optarg); break;
            case 'q': options.qos = atoi(optarg); break;
            case 'n': options.count = atoll(optarg); break;
            default: exit(2);
        }
    }
    bool is_good = options.payloads != NULL && options.devices > 0 && options.outstanding > 0 && options.seconds > 0 &&
                   options.rate >= 0 && (options.qos == 0 || options.qos == 1);
    if (!is_good) die("expected --payloads FILE, and positive numbers; --qos is 0 or 1");
}

int main(int count, char **arguments) {
    parse_options(count, arguments);
    load_payloads(options.payloads);
    encode_properties();
    poller = epoll_create1(0);
    connect_devices();
    double cpu_before = cpu_s();
    int64_t took_ns = run();
    report(took_ns, cpu_s() - cpu_before);
    return 0;
}
