//! A Kubernetes API in front of another one, which says no to some requests and hands on the rest: rights that somebody has not,
//! or has no longer.

use std::io;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// What a client asks for.
pub(crate) struct Asked {
    method: String,
    target: String,
    body: Vec<u8>,
}

impl Asked {
    pub(crate) fn writes(&self) -> bool {
        self.method != "GET"
    }

    /// Whether it asks what would be answered, and changes nothing.
    pub(crate) fn is_rehearsal(&self) -> bool {
        // A deletion says so in its body.
        self.target.contains("dryRun=All") || self.body.windows(8).any(|window| window == b"\"dryRun\"")
    }

    /// Whether it is about Secrets.
    pub(crate) fn is_about_secrets(&self) -> bool {
        self.target.split('?').next().is_some_and(|path| path.contains("/secrets"))
    }
}

/// The URL of one in front of `server`, for as long as the test runs.
pub(crate) async fn refusing(
    server: &str,
    refuses: impl Fn(&Asked) -> bool + Send + Sync + Clone + 'static,
) -> String {
    let server = server.trim_start_matches("http://").to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (server, refuses) = (server.clone(), refuses.clone());
            // A client that has gone is no failure of the test.
            tokio::spawn(async move { answer_one(client, &server, refuses).await });
        }
    });
    format!("http://{address}")
}

/// One request per connection, so that each is seen.
async fn answer_one(client: TcpStream, server: &str, refuses: impl Fn(&Asked) -> bool) -> io::Result<()> {
    let mut client = BufReader::new(client);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if client.read_line(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let header = |name: &str| {
        head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    let length = header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    client.read_exact(&mut body).await?;
    let mut words = head.split(' ').map(str::to_owned);
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(()) };
    let asked = Asked { method, target, body };
    if refuses(&asked) {
        let status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Forbidden", "code": 403,
            "message": format!("{} is forbidden: User \"me\" cannot do that", asked.target.split('?').next().unwrap()),
        })
        .to_string();
        let answer = format!(
            "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{status}",
            status.len()
        );
        return client.write_all(answer.as_bytes()).await;
    }
    let mut server = TcpStream::connect(server).await?;
    let (first, rest) = head.split_once("\r\n").unwrap();
    server.write_all(format!("{first}\r\nConnection: close\r\n{rest}").as_bytes()).await?;
    server.write_all(&asked.body).await?;
    tokio::io::copy(&mut server, &mut client).await?;
    client.shutdown().await
}
