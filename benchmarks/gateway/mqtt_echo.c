/* What a gateway costs that does nothing: each question is answered at once, with the same bytes, and then acknowledged.

       mqtt_echo --port 1883 --site echo --reply FILE [--subscribe-qos 1] [--reply-qos 1]

   It subscribes as a gateway does, in a shared group, and replies with the question's correlation data to the topic
   derived from the question's. Says `ready` when it is subscribed, and runs until it is killed. */
#include "mqtt.h"

#include <getopt.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RECEIVE_MAXIMUM = 200, MAX_REPLY_BYTES = 65536 };

static const char UP[] = "shoal/v1/up/", DOWN[] = "shoal/v1/down/", INFER[] = "/infer", REPLY[] = "/reply";

static struct span load_reply(const char *path) {
    static uint8_t reply[MAX_REPLY_BYTES];
    FILE *file = fopen(path, "rb");
    if (file == NULL) die("cannot read %s", path);
    size_t size = fread(reply, 1, sizeof reply, file);
    fclose(file);
    return (struct span){reply, size};
}

/* shoal/v1/up/SITE/NODE/infer -> shoal/v1/down/SITE/NODE/reply, into `out`. */
static struct span reply_topic(struct span asked, uint8_t *out, size_t capacity) {
    size_t head = strlen(UP), tail = strlen(INFER);
    if (asked.size < head + tail || asked.size + strlen(DOWN) > capacity) die("a topic that is no question's");
    size_t names = asked.size - head - tail;
    memcpy(out, DOWN, strlen(DOWN));
    memcpy(out + strlen(DOWN), asked.data + head, names);
    memcpy(out + strlen(DOWN) + names, REPLY, strlen(REPLY));
    return (struct span){out, strlen(DOWN) + names + strlen(REPLY)};
}

static void answer(struct client *client, struct span properties, struct span reply, uint8_t qos) {
    struct packet packet;
    while (client_next(client, &packet)) {
        struct publish question;
        if (packet.type != PUBLISH || !parse_publish(&packet, &question)) die("a packet that is no question");
        uint8_t topic[512];
        put_publish(client, reply_topic(question.topic, topic, sizeof topic), question.qos < qos ? question.qos : qos, properties, question.correlation,
                    reply);
        if (question.qos) put_puback(client, question.id);
    }
}

int main(int count, char **arguments) {
    const char *host = "127.0.0.1", *port = "1883", *site = "echo", *reply_path = NULL;
    int subscribe_qos = 1, reply_qos = 1;
    static const struct option known[] = {
        {"host", 1, NULL, 'h'}, {"port", 1, NULL, 'p'}, {"site", 1, NULL, 's'}, {"reply", 1, NULL, 'r'},
        {"subscribe-qos", 1, NULL, 'S'}, {"reply-qos", 1, NULL, 'R'}, {NULL, 0, NULL, 0},
    };
    int option;
    while ((option = getopt_long(count, arguments, "", known, NULL)) != -1) {
        switch (option) {
            case 'h': host = optarg; break;
            case 'p': port = optarg; break;
            case 's': site = optarg; break;
            case 'r': reply_path = optarg; break;
            case 'S': subscribe_qos = atoi(optarg); break;
            case 'R': reply_qos = atoi(optarg); break;
            default: exit(2);
        }
    }
    bool is_good = reply_path != NULL && (subscribe_qos | 1) == 1 && (reply_qos | 1) == 1;
    if (!is_good) die("expected --reply FILE; a QoS is 0 or 1");
    struct span reply = load_reply(reply_path);
    uint8_t encoded[256];
    size_t size = encode_string_property(encoded, 0x03, "application/x-protobuf", NULL);
    size += encode_string_property(encoded + size, 0x26, "schema", "shoal.v1.InferenceReply");
    char filter[256];
    snprintf(filter, sizeof filter, "$share/gw-echo/%s%s/+%s", UP, site, INFER);
    struct client client;
    client_connect(&client, host, port, "gw-echo", RECEIVE_MAXIMUM);
    client_subscribe(&client, filter, (uint8_t)subscribe_qos);
    puts("ready");
    fflush(stdout);
    for (;;) {
        bool is_flushed = client_flush(&client);
        poll(&(struct pollfd){.fd = client.fd, .events = is_flushed ? POLLIN : POLLIN | POLLOUT}, 1, -1);
        client_read(&client);
        answer(&client, (struct span){encoded, size}, reply, (uint8_t)reply_qos);
    }
}
