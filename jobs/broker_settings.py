"""What the development broker is told: ``server.properties`` and its log configuration."""

from __future__ import annotations

import base64
import uuid
from pathlib import Path

HOST = "127.0.0.1"

# Why each line that departs from Kafka's defaults is there:
#   * replication factors and in-sync replicas of 1: there is one broker;
#   * few partitions for the internal topics: the default of 50 each makes the first consumer group wait;
#   * no automatic topics: a misspelt name must be an error, not an empty topic;
#   * retention -1 and no upper bound on timestamps: messages carry event time, which in a replayed or
#     simulated log can lie years back or ahead;
#   * a small cleaner buffer: the default of 128 MB is a quarter of the heap;
#   * a shorter session: after a crash the broker cannot register again before its old session has ended.
_SERVER_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={log_dir}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
log.retention.ms=-1
log.message.timestamp.after.max.ms=9223372036854775807
log.cleaner.dedupe.buffer.size=16777216
broker.session.timeout.ms=5000
broker.heartbeat.interval.ms=1000
"""

# Kafka's standard output goes to kafka.log as well, so that one file holds all it says.
LOG4J_PROPERTIES = """\
status=error
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=[%d{ISO8601}] %p %m (%c)%n
rootLogger.level=warn
rootLogger.appenderRef.out.ref=out
"""


def server_properties(*, port: int, controller_port: int, log_dir: Path) -> str:
    """Write out ``server.properties`` for a combined broker and controller on the loopback address."""
    return _SERVER_PROPERTIES.format(host=HOST, port=port, controller_port=controller_port, log_dir=log_dir)


def new_cluster_id() -> str:
    """A random cluster id as Kafka writes it: 16 bytes in URL-safe base64, not starting with a dash."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not text.startswith("-"):  # it would be read as an option
            return text
