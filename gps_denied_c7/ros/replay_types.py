"""What a bag's messages meet: the installed types and their definitions, and subscribers that do not match."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSCompatibility, QoSProfile, qos_check_compatible

from gps_denied_c7.ros.bag import BagError, BagTopic

__all__ = ['message_type', 'mismatched_subscribers', 'other_definitions']

_log = logging.getLogger('c7_replay')


def message_type(name: str) -> Any:
    """Return the Python class of a message type such as ``sensor_msgs/msg/Image`` or ``std_srvs/srv/Empty_Event``."""
    package, kind, message = name.split('/')
    try:
        found = getattr(importlib.import_module(f'{package}.{kind}'), message.partition('_')[0])
        # The messages that a service or an action consists of are beside it in its module.
        return getattr(sys.modules[found.__module__], message) if '_' in message else found
    except Exception as error:
        # Importing a package may fail in any way, as with one that was built for another Python.
        debian = f'ros-{os.environ.get("ROS_DISTRO", "$ROS_DISTRO")}-{package.replace("_", "-")}'
        raise BagError(
            f'{name} is not installed.', remedy=f'sudo apt-get install {debian}, or source the workspace that has it.'
        ) from error


def other_definitions(node: Node, name: str, topic: BagTopic) -> Iterator[str]:
    """Say where the bag's message definition is not the installed one: raw CDR would be read wrongly."""
    for info in node.get_publishers_info_by_topic(name):
        # Humble's endpoint info has no type hash.
        if info.node_name == node.get_name() and (installed := getattr(info, 'topic_type_hash', None)):
            recorded = topic.type_hashes or {_hash_of(text, topic) for text in topic.definitions}
            for other in sorted(recorded - {str(installed), ''}):
                yield (
                    f'{name}: {topic.msgtype} was recorded with another definition ({other}) than is installed '
                    f'({installed}); values may be wrong.'
                )
            return


def _hash_of(definition: str, topic: BagTopic) -> str:
    """Compute the type hash of a definition, as for bags from before type hashes; '' where that fails."""
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.EMPTY)
    try:
        store.register(get_types_from_msg(definition, topic.msgtype))
        return store.hash_rihs01(topic.msgtype)
    except Exception as error:
        # rosbags' parser has no error class for text that is not a definition.
        _log.info('%s: the definition of %s in the bag cannot be read: %s', topic.name, topic.msgtype, error)
        return ''


def mismatched_subscribers(node: Node, name: str, msgtype: str, offered: QoSProfile) -> Iterator[str]:
    """Name each node that subscribes to a topic with another type, or requests more than is offered, and say which."""
    for info in node.get_subscriptions_info_by_topic(name):
        subscriber = f'{info.node_namespace.rstrip("/")}/{info.node_name}'
        compatible, reasons = qos_check_compatible(offered, info.qos_profile)
        if info.topic_type != msgtype:
            yield f'{subscriber} (subscribes as {info.topic_type}, the bag has {msgtype})'
        elif compatible == QoSCompatibility.ERROR:
            texts = [text.removeprefix('ERROR: ').lower() for text in reasons.split(';') if text.startswith('ERROR: ')]
            yield f'{subscriber} ({"; ".join(texts)})'
