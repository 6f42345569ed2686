#include "mqtt.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { READ_BYTES = 1 << 18 };
/* MQTT 5, sections 2.2.2.2 and 3.1.2.11. */
enum property {
    PAYLOAD_FORMAT = 0x01,
    EXPIRY = 0x02,
    CONTENT_TYPE = 0x03,
    RESPONSE_TOPIC = 0x08,
    CORRELATION = 0x09,
    SUBSCRIPTION_ID = 0x0B,
    RECEIVE_MAXIMUM = 0x21,
    TOPIC_ALIAS = 0x23,
    USER_PROPERTY = 0x26,
};

void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

/* -- buffers ----------------------------------------------------------------------------------------------------- */

static uint8_t *reserve(struct buffer *buffer, size_t size) {
    if (buffer->end + size > buffer->capacity && buffer->start > 0) {
        memmove(buffer->data, buffer->data + buffer->start, buffer->end - buffer->start);
        buffer->end -= buffer->start;
        buffer->start = 0;
    }
    if (buffer->end + size > buffer->capacity) {
        buffer->capacity = 2 * (buffer->end + size);
        buffer->data = realloc(buffer->data, buffer->capacity);
        if (buffer->data == NULL) die("out of memory");
    }
    return buffer->data + buffer->end;
}

static void put(struct buffer *buffer, const void *data, size_t size) {
    memcpy(reserve(buffer, size), data, size);
    buffer->end += size;
}

static void put_byte(struct buffer *buffer, uint8_t value) { put(buffer, &value, 1); }

static void put_u16(struct buffer *buffer, uint16_t value) {
    put(buffer, (uint8_t[]){(uint8_t)(value >> 8), (uint8_t)value}, 2);
}

static void put_bytes(struct buffer *buffer, struct span bytes) {
    put_u16(buffer, (uint16_t)bytes.size);
    put(buffer, bytes.data, bytes.size);
}

static void put_varint(struct buffer *buffer, size_t value) {
    do {
        uint8_t low = value & 0x7F;
        value >>= 7;
        put_byte(buffer, value ? low | 0x80 : low);
    } while (value);
}

static size_t varint_size(size_t value) {
    return value < 128 ? 1 : value < 16384 ? 2 : value < 2097152 ? 3 : 4;
}

static struct span text(const char *string) { return (struct span){(const uint8_t *)string, strlen(string)}; }

/* -- reading what a peer wrote: a cursor that never passes the end ------------------------------------------------- */

struct cursor {
    const uint8_t *at, *end;
    bool is_bad;
};

static struct span take(struct cursor *cursor, size_t size) {
    if (cursor->is_bad || (size_t)(cursor->end - cursor->at) < size) {
        cursor->is_bad = true;
        return (struct span){NULL, 0};
    }
    struct span taken = {cursor->at, size};
    cursor->at += size;
    return taken;
}

static uint32_t take_number(struct cursor *cursor, size_t size) {
    struct span bytes = take(cursor, size);
    uint32_t value = 0;
    for (size_t i = 0; i < bytes.size; i++) value = value << 8 | bytes.data[i];
    return value;
}

static uint32_t take_varint(struct cursor *cursor) {
    uint32_t value = 0;
    for (int shift = 0; shift < 28; shift += 7) {
        uint32_t byte = take_number(cursor, 1);
        value |= (byte & 0x7F) << shift;
        if (!(byte & 0x80)) return value;
    }
    cursor->is_bad = true;
    return 0;
}

static struct span take_bytes(struct cursor *cursor) { return take(cursor, take_number(cursor, 2)); }

/* Walks over the properties of a PUBLISH; what is not asked for is skipped. */
static void take_publish_properties(struct cursor *cursor, struct span *correlation) {
    struct span all = take(cursor, take_varint(cursor));
    struct cursor inner = {all.data, all.data + all.size, cursor->is_bad};
    while (!inner.is_bad && inner.at < inner.end) {
        switch (take_number(&inner, 1)) {
            case PAYLOAD_FORMAT: take(&inner, 1); break;
            case EXPIRY: take(&inner, 4); break;
            case TOPIC_ALIAS: take(&inner, 2); break;
            case SUBSCRIPTION_ID: take_varint(&inner); break;
            case CONTENT_TYPE:
            case RESPONSE_TOPIC: take_bytes(&inner); break;
            case CORRELATION: *correlation = take_bytes(&inner); break;
            case USER_PROPERTY: take_bytes(&inner), take_bytes(&inner); break;
            default: inner.is_bad = true;
        }
    }
    cursor->is_bad |= inner.is_bad;
}

bool parse_publish(const struct packet *packet, struct publish *publish) {
    struct cursor cursor = {packet->body, packet->body + packet->size, false};
    *publish = (struct publish){.qos = packet->flags >> 1 & 3};
    publish->topic = take_bytes(&cursor);
    if (publish->qos) publish->id = (uint16_t)take_number(&cursor, 2);
    take_publish_properties(&cursor, &publish->correlation);
    publish->payload = take(&cursor, cursor.is_bad ? 0 : (size_t)(cursor.end - cursor.at));
    return !cursor.is_bad;
}

/* -- sockets ------------------------------------------------------------------------------------------------------- */

static int open_socket(const char *host, const char *port) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int problem = getaddrinfo(host, port, &hints, &found);
    if (problem) die("%s:%s: %s", host, port, gai_strerror(problem));
    int fd = socket(found->ai_family, found->ai_socktype, 0);
    if (fd < 0 || connect(fd, found->ai_addr, found->ai_addrlen) < 0) die("%s:%s: %s", host, port, strerror(errno));
    freeaddrinfo(found);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    return fd;
}

void client_read(struct client *client) {
    ssize_t got = recv(client->fd, reserve(&client->in, READ_BYTES), READ_BYTES, 0);
    if (got == 0) die("the broker closed the connection");
    if (got < 0 && errno != EAGAIN && errno != EINTR) die("recv: %s", strerror(errno));
    if (got > 0) client->in.end += (size_t)got;
}

bool client_flush(struct client *client) {
    struct buffer *out = &client->out;
    while (out->start < out->end) {
        ssize_t sent = send(client->fd, out->data + out->start, out->end - out->start, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) return false;
        if (sent < 0 && errno != EINTR) die("send: %s", strerror(errno));
        if (sent > 0) out->start += (size_t)sent;
    }
    out->start = out->end = 0;
    return true;
}

static bool next_of_any_type(struct client *client, struct packet *packet) {
    struct buffer *in = &client->in;
    struct cursor cursor = {in->data + in->start, in->data + in->end, false};
    uint8_t head = (uint8_t)take_number(&cursor, 1);
    size_t size = take_varint(&cursor);
    struct span body = take(&cursor, size);
    if (cursor.is_bad) return false;
    *packet = (struct packet){head >> 4, head & 15, body.data, body.size};
    in->start = (size_t)(cursor.at - in->data);
    if (in->start == in->end) in->start = in->end = 0;
    return true;
}

bool client_next(struct client *client, struct packet *packet) {
    while (next_of_any_type(client, packet)) {
        if (packet->type == DISCONNECT) die("the broker says goodbye: reason 0x%02x", packet->size ? packet->body[0] : 0);
        if (packet->type != PUBACK) return true;
        client->unacked -= client->unacked > 0;
        if (packet->size > 2 && packet->body[2] >= 0x80) die("a message was refused: reason 0x%02x", packet->body[2]);
    }
    return false;
}

/* -- packets ------------------------------------------------------------------------------------------------------- */

static void wait_for(struct client *client, enum packet_type type, struct packet *packet) {
    while (!client_flush(client)) poll(&(struct pollfd){.fd = client->fd, .events = POLLOUT}, 1, -1);
    while (!client_next(client, packet)) {
        if (poll(&(struct pollfd){.fd = client->fd, .events = POLLIN}, 1, 5000) == 0) die("no answer from the broker");
        client_read(client);
    }
    if (packet->type != type) die("packet of type %d, expected %d", packet->type, type);
}

static uint32_t receive_maximum_of(struct cursor cursor) {
    uint32_t size = take_varint(&cursor);
    const uint8_t *end = cursor.at + size;
    while (!cursor.is_bad && cursor.at < end) {
        switch (take_number(&cursor, 1)) {
            case RECEIVE_MAXIMUM: return take_number(&cursor, 2);
            case 0x11: case 0x27: take(&cursor, 4); break;
            case 0x22: case 0x13: take(&cursor, 2); break;
            case 0x24: case 0x25: case 0x28: case 0x29: case 0x2A: take(&cursor, 1); break;
            case 0x12: case 0x15: case 0x16: case 0x1A: case 0x1C: case 0x1F: take_bytes(&cursor); break;
            case USER_PROPERTY: take_bytes(&cursor), take_bytes(&cursor); break;
            default: die("CONNACK with a property of no known kind");
        }
    }
    return UINT16_MAX; /* what the absence of the property means */
}

void client_connect(struct client *client, const char *host, const char *port, const char *id, uint16_t receive_maximum) {
    *client = (struct client){.fd = open_socket(host, port)};
    struct span name = text(id);
    put_byte(&client->out, 0x10);
    put_varint(&client->out, 10 + 1 + 3 + 2 + name.size);
    put_bytes(&client->out, text("MQTT"));
    put(&client->out, (uint8_t[]){5, 0x02, 0, 0}, 4); /* version, clean start, no keep-alive */
    put_byte(&client->out, 3);
    put_byte(&client->out, RECEIVE_MAXIMUM);
    put_u16(&client->out, receive_maximum);
    put_bytes(&client->out, name);
    struct packet packet;
    wait_for(client, CONNACK, &packet);
    if (packet.size < 3 || packet.body[1] != 0) die("connection of %s refused: reason 0x%02x", id, packet.body[1]);
    client->receive_maximum = receive_maximum_of((struct cursor){packet.body + 2, packet.body + packet.size, false});
}

void client_subscribe(struct client *client, const char *filter, uint8_t qos) {
    struct span name = text(filter);
    put_byte(&client->out, 0x82);
    put_varint(&client->out, 2 + 1 + 2 + name.size + 1);
    put_u16(&client->out, 1);
    put_byte(&client->out, 0);
    put_bytes(&client->out, name);
    put_byte(&client->out, qos);
    struct packet packet;
    wait_for(client, SUBACK, &packet);
    uint8_t reason = packet.body[packet.size - 1];
    if (reason != qos) die("subscription to %s: reason 0x%02x, expected 0x%02x", filter, reason, qos);
}

void put_publish(struct client *client, struct span topic, uint8_t qos, struct span properties, struct span correlation,
                 struct span payload) {
    size_t properties_size = properties.size + 3 + correlation.size;
    size_t id_size = qos ? 2 : 0;
    struct buffer *out = &client->out;
    put_byte(out, (uint8_t)(PUBLISH << 4 | qos << 1));
    put_varint(out, 2 + topic.size + id_size + varint_size(properties_size) + properties_size + payload.size);
    put_bytes(out, topic);
    if (qos) {
        client->last_id = client->last_id == UINT16_MAX ? 1 : client->last_id + 1;
        put_u16(out, client->last_id);
        client->unacked++;
    }
    put_varint(out, properties_size);
    put(out, properties.data, properties.size);
    put_byte(out, CORRELATION);
    put_bytes(out, correlation);
    put(out, payload.data, payload.size);
}

void put_puback(struct client *client, uint16_t id) {
    put(&client->out, (uint8_t[]){PUBACK << 4, 2, (uint8_t)(id >> 8), (uint8_t)id}, 4);
}

size_t encode_string_property(uint8_t *out, uint8_t identifier, const char *name, const char *value) {
    struct buffer buffer = {NULL, 0, 0, 0};
    put_byte(&buffer, identifier);
    put_bytes(&buffer, text(name));
    if (value != NULL) put_bytes(&buffer, text(value));
    memcpy(out, buffer.data, buffer.end);
    free(buffer.data);
    return buffer.end;
}
