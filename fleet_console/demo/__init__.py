"""`shoal demo`: the whole loop on real data, as separate processes that share nothing but MQTT topics."""
