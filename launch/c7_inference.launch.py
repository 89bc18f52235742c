"""Start c7_inference_node: ros2 launch gps_denied_c7 c7_inference.launch.py model:=/path/to/bundle."""

import os

import yaml
from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction, SetEnvironmentVariable
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from gps_denied_c7.ros.fastdds import apply_profile


def generate_launch_description() -> LaunchDescription:
    """
    Describe one inference node.

    The node activates itself (``autostart``). No lifecycle event is emitted from here: after a respawn it would
    call the dead process's service and hang.
    """
    share = get_package_share_directory('gps_denied_c7')
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                'params_file',
                default_value=os.path.join(share, 'config', 'c7_inference.yaml'),
                description='Parameter file; the other arguments override it.',
            ),
            DeclareLaunchArgument('namespace', default_value='', description='Namespace of the node.'),
            DeclareLaunchArgument('name', default_value='c7_inference', description='Name of the node.'),
            DeclareLaunchArgument(
                'image_topics',
                default_value='',
                description='One image topic, or a list: "[/front/image_raw, /down/image_raw]"; '
                'empty: those of the parameter file.',
            ),
            DeclareLaunchArgument(
                'model',
                default_value='',
                description='Model bundle directory or .onnx file; empty: that of the parameter file.',
            ),
            DeclareLaunchArgument(
                'autostart',
                default_value='true',
                description='Let the node configure and activate itself; false: a lifecycle manager does it.',
            ),
            DeclareLaunchArgument(
                'use_sim_time',
                default_value='',
                description='Take ROS time from /clock; empty: as the parameter file says.',
            ),
            DeclareLaunchArgument(
                'log_level',
                default_value='info',
                choices=['debug', 'info', 'warn', 'error', 'fatal'],
                description='Lowest severity that is logged.',
            ),
            DeclareLaunchArgument('respawn', default_value='true', description='Restart the node when it dies.'),
            DeclareLaunchArgument('respawn_delay', default_value='0.2', description='Pause before a restart, seconds.'),
            DeclareLaunchArgument(
                'dds_profile',
                default_value='true',
                description='Use the shipped shared-memory profile where no other is set and the RMW is Fast DDS. '
                'The camera driver needs it too: what is launched after this gets it.',
            ),
            OpaqueFunction(function=_select_dds_profile, condition=IfCondition(LaunchConfiguration('dds_profile'))),
            OpaqueFunction(function=_node),
        ]
    )


def _select_dds_profile(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """Put the profile into the environment of what is launched, by the rule that the node itself follows."""
    environment = dict(context.environment)
    decision = apply_profile(environment)
    changed = {name: value for name, value in environment.items() if context.environment.get(name) != value}
    return [
        LogInfo(msg=decision.reason),
        *(SetEnvironmentVariable(name, value) for name, value in changed.items()),
    ]


def _node(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    def argument(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    def switch(name: str) -> ParameterValue:
        return ParameterValue(LaunchConfiguration(name), value_type=bool)

    params_file = os.path.expanduser(argument('params_file'))
    if not os.path.isfile(params_file):
        # launch would warn, and start the node with its defaults.
        raise FileNotFoundError(f'params_file: {params_file} is not a file.')
    parameters = {'autostart': switch('autostart')}
    if argument('use_sim_time'):
        parameters['use_sim_time'] = switch('use_sim_time')
    if argument('image_topics'):
        parameters['image_topics'] = _topics(argument('image_topics'))
    if argument('model'):
        parameters['model_path'] = ParameterValue(os.path.expanduser(argument('model')), value_type=str)
    return [
        Node(
            package='gps_denied_c7',
            executable='c7_inference_node',
            name=argument('name'),
            namespace=argument('namespace'),
            parameters=[params_file, parameters],
            ros_arguments=['--log-level', argument('log_level')],
            respawn=LaunchConfiguration('respawn'),
            respawn_delay=float(argument('respawn_delay')),
            output='screen',
        )
    ]


def _topics(text: str) -> list[str]:
    value = yaml.safe_load(text)
    topics = value if isinstance(value, list) else [value]
    if not topics or not all(isinstance(topic, str) for topic in topics):
        raise ValueError(f'image_topics: {text} names no topics; write "[/front/image_raw, /down/image_raw]".')
    return topics
