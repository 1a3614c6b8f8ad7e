//! The WireGuard device as a program of its own: it outlives whoever configures it.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};
use isthmus_daemon::{Endpoints, LogFormat, LogLevel, LoopbackAddr, init_logging, shutdown_on_signal};
use isthmus_wireguard::control;
use isthmus_wireguard::device::{Device, DeviceOptions};
use isthmus_wireguard::metrics;
use isthmus_wireguard::uapi::Server;
use tokio_util::sync::CancellationToken;

const EXAMPLES: &str = "Examples:
  # A device with the name and MTU that the node agent expects, on a network with an MTU of 1500:
  isthmus-wireguard --interface isthmus_wg0 --mtu 1420

  # It is configured like every WireGuard device, by the node agent or by hand:
  wg set isthmus_wg0 private-key /path/key listen-port 51871
  wg set isthmus_wg0 peer <PUBLIC KEY> endpoint 192.0.2.7:51871 allowed-ips 10.1.7.0/24
  wg show isthmus_wg0

  # What it counts, dropped packets by reason among it:
  curl http://127.0.0.1:9964/metrics

  # The interface stays when the process ends, so that a restart changes nothing for others. To remove it:
  isthmus-wireguard delete --interface isthmus_wg0";

/// A WireGuard device in user space.
///
/// Makes a TUN interface and a UAPI socket through which it is configured. Without a key and peers it drops
/// everything. Needs CAP_NET_ADMIN and /dev/net/tun.
#[derive(Parser)]
#[command(
    name = "isthmus-wireguard",
    version,
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Run,
}

#[derive(Subcommand)]
enum Command {
    /// Remove the interface that an ended device has left.
    Delete {
        /// Name of the interface
        #[arg(long, value_name = "NAME", default_value = "isthmus_wg0")]
        interface: String,
    },
}

#[derive(Args)]
struct Run {
    /// Name of the interface
    #[arg(long, value_name = "NAME", default_value = "isthmus_wg0")]
    interface: String,
    /// MTU of the interface: that of the network below minus 80
    #[arg(long, value_name = "BYTES", default_value_t = 1420, value_parser = clap::value_parser!(u16).range(1280..=65_400))]
    mtu: u16,
    /// Folder of the UAPI socket, where `wg` looks for it
    #[arg(long, value_name = "DIR", default_value = "/var/run/wireguard")]
    uapi_dir: PathBuf,
    /// Threads for packets; as many as there are processors, at most 8, if not given
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Where /metrics is served, in plain text and therefore on loopback only
    #[arg(long, value_name = "ADDRESS", default_value_t = LoopbackAddr::ipv4(9964))]
    metrics_address: LoopbackAddr,
    /// Where the kernel has WireGuard, make no device: node agents use the kernel's. Metrics answer all the same
    #[arg(long, conflicts_with = "ephemeral")]
    unless_kernel: bool,
    /// The interface goes when the process ends, with its addresses and routes
    #[arg(long)]
    ephemeral: bool,
    /// Stay in the foreground: always so, taken for those who are used to other devices
    #[arg(long, short, hide = true)]
    foreground: bool,
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
    /// What is logged: a level, or a list of target=level
    #[arg(long, value_name = "FILTER", env = "RUST_LOG", default_value = "info,boringtun=off")]
    log_level: LogLevel,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Some(Command::Delete { interface }) => delete(&interface),
        None => serve(cli.run),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("isthmus-wireguard: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(run: Run) -> anyhow::Result<()> {
    init_logging(run.log_format, &run.log_level)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let shutdown = shutdown_on_signal()?;
        if run.unless_kernel && control::kernel_is_chosen(&run.interface).await? {
            return stand_by(&run, shutdown).await;
        }
        let server = Server::bind(&run.uapi_dir, &run.interface)?;
        let options = DeviceOptions {
            workers: run.threads.unwrap_or_else(default_threads),
            ephemeral: run.ephemeral,
            ..DeviceOptions::new(&run.interface, run.mtu)
        };
        let device = Arc::new(Device::open(&options)?);
        let mut endpoints = Endpoints::new(shutdown.clone());
        let registry = Arc::new(metrics::registry(Arc::clone(&device)));
        let metrics = endpoints.metrics(run.metrics_address, registry).await?;
        tracing::info!(
            interface = device.name(),
            uapi = %server.path().display(),
            %metrics,
            "ready to be configured"
        );
        let broken = device.broken();
        tokio::select! {
            () = server.serve(device, shutdown.clone()) => {}
            () = broken.cancelled() => shutdown.cancel(),
        }
        endpoints.finish().await;
        anyhow::ensure!(
            !broken.is_cancelled(),
            "interface {} was deleted while in use; start again to make it anew, and configure it again",
            options.name
        );
        Ok(())
    })
}

/// Nothing to do on this node, and nothing wrong with it: whoever starts this program would start it again if it ended.
async fn stand_by(run: &Run, shutdown: CancellationToken) -> anyhow::Result<()> {
    let mut endpoints = Endpoints::new(shutdown.clone());
    let metrics = endpoints.metrics(run.metrics_address, Arc::default()).await?;
    tracing::info!(interface = run.interface, %metrics, "this kernel has WireGuard, which node agents use: no device is made here");
    shutdown.cancelled().await;
    endpoints.finish().await;
    Ok(())
}

fn default_threads() -> NonZeroUsize {
    const MANY: NonZeroUsize = NonZeroUsize::new(8).expect("not zero");
    std::thread::available_parallelism().map_or(NonZeroUsize::MIN, |threads| threads.min(MANY))
}

fn delete(interface: &str) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(isthmus_wireguard::device::delete_interface(interface))?)
}
