/* What a load generator and an echo need of an MQTT 5 client: QoS 0 and 1 over one non-blocking socket. */
#ifndef MQTT_H
#define MQTT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum packet_type { CONNACK = 2, PUBLISH = 3, PUBACK = 4, SUBACK = 9, DISCONNECT = 14 };

struct buffer {
    uint8_t *data;
    size_t start, end, capacity;
};

/* One connection. `unacked` counts our QoS 1 messages without PUBACK; `receive_maximum` is the broker's bound on it. */
struct client {
    int fd;
    struct buffer in, out;
    uint16_t last_id;
    uint32_t unacked, receive_maximum;
};

/* Points into the client's buffer: valid until the next `client_read`. */
struct packet {
    uint8_t type, flags;
    const uint8_t *body;
    size_t size;
};

struct span {
    const uint8_t *data;
    size_t size;
};

struct publish {
    struct span topic, correlation, payload;
    uint8_t qos;
    uint16_t id;
};

/* All of these end the program with a message where the broker refuses, or is gone. */
_Noreturn void die(const char *format, ...);
/* Blocks until CONNACK: a clean session without expiry, TCP_NODELAY. */
void client_connect(struct client *client, const char *host, const char *port, const char *id, uint16_t receive_maximum);
/* Blocks until SUBACK. */
void client_subscribe(struct client *client, const char *filter, uint8_t qos);
/* Reads what has arrived, without blocking. */
void client_read(struct client *client);
/* The next whole packet of what has been read. PUBACKs are counted here and not returned. */
bool client_next(struct client *client, struct packet *packet);
/* Sends as much as the socket takes; true when nothing is left. */
bool client_flush(struct client *client);

bool parse_publish(const struct packet *packet, struct publish *publish);
/* `properties` is encoded, without its length; the correlation data is added to it. Nothing leaves before the flush. */
void put_publish(struct client *client, struct span topic, uint8_t qos, struct span properties, struct span correlation,
                 struct span payload);
void put_puback(struct client *client, uint16_t id);

/* Appends a property of one string, or of two for a user property (`value` not null). Returns its size. */
size_t encode_string_property(uint8_t *out, uint8_t identifier, const char *name, const char *value);

#endif
